"""What lets verl and vLLM run where there is no accelerator. Importing this package imports neither."""
