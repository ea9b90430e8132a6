"""7.39 B parameters: 32 layers, grouped-query attention, untied head."""

from sevenfold.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=50_304,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    max_seq_len=2048,
    rope_theta=500_000.0,
    norm_eps=1e-5,
    tie_embeddings=False,
)
