"""The scripts `load.py` that some exports bring along: they compute the scores with transformers and safetensors alone."""
