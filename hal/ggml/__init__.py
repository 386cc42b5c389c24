"""ggml through its C library: what the backend of that name is made of."""
