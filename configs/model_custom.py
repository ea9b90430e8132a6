"""1.3 M parameters with a vocabulary for real text: to try one's own files on a CPU."""

from sevenfold.model.config import ModelConfig

MODEL = ModelConfig(
    vocab_size=4096,
    hidden_size=128,
    intermediate_size=384,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    max_seq_len=256,
    rope_theta=10_000.0,
    norm_eps=1e-5,
    tie_embeddings=True,
)
