"""The model and what is done around it: config, llama, kernels, attention, float8, lora."""
