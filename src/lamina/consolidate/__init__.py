"""What happens around any method at the end of a task: the average, the shift and the tail. Pure functions of tensors."""
