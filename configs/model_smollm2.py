"""SmolLM2-135M: 30 layers, grouped-query attention, tied head."""

from sevenfold.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    max_seq_len=8192,
    rope_theta=100_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
