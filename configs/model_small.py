"""125 M parameters, GPT-2's size: 12 layers, grouped-query attention, tied head."""

from sevenfold.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=50_304,
    hidden_size=768,
    intermediate_size=2432,
    num_layers=12,
    num_heads=12,
    num_kv_heads=4,
    max_seq_len=2048,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
