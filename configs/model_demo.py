"""0.4 M parameters: small enough to learn the village on two CPU cores in minutes."""

from sevenfold.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=1024,
    hidden_size=96,
    intermediate_size=256,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=256,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
