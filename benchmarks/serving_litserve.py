"""A model behind LitServe, for `benchmarks/serving.py`: python benchmarks/serving_litserve.py MODEL PORT BATCH SECONDS."""

import sys
from pathlib import Path
from typing import Any

import litserve  # type: ignore[import-not-found]
from fastapi import Request

from lamina.model import Model


class Api(litserve.LitAPI):  # type: ignore[misc]
    """LitServe decodes and computes in a process of its own, which loads this class anew."""

    path: str

    def setup(self, device: str) -> None:
        del device
        self.predictor = Model(Path(self.path)).predictor()

    def decode_request(self, request: Request) -> bytes:
        content: bytes = request["file"].file.read()  # LitServe puts the form in its place
        return content

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, x: list[bytes]) -> list[Any]:
        return list(self.predictor.predict(x, 5))

    def unbatch(self, output: list[Any]) -> list[Any]:
        return output

    def encode_response(self, output: Any) -> dict[str, Any]:
        return {"class": output.label, "probability": output.probability}


if __name__ == "__main__":
    model, port, size, wait = sys.argv[1:]
    api = Api(max_batch_size=int(size), batch_timeout=float(wait))
    api.path = model
    server = litserve.LitServer(api, accelerator="cpu")
    server.run(port=int(port), generate_client_file=False, log_level="error")
