"""The settings of this room: a model's sizes and what follows from them, and its smaller choices.

They stand together because importing this module is quick: torch comes with the modules that use
the settings, transformers only when a configuration for it is made.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from sevenfold.base.config import configuration
from sevenfold.base.errors import UsageError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PretrainedConfig


@configuration
class ModelConfig:
    """Sizes of a Llama-style decoder.

    Errors:
        ValueError: a size is not positive, or two of them do not go together.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_seq_len: int
    rope_theta: float
    norm_eps: float
    tie_embeddings: bool
    head_dim: int | None = None
    """Width of one head; None: hidden_size / num_heads, as in Llama."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "tie_embeddings" and value is not None and not value > 0:
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}; "
                "change one of them"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not divisible by num_kv_heads "
                f"{self.num_kv_heads}; every key-value head serves equally many query heads"
            )
        if self.head_width % 2:
            raise ValueError(
                f"a head is {self.head_width} wide; rotary embeddings need an even width, so "
                "change hidden_size or num_heads"
            )

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def num_layer_matmul_parameters(self) -> int:
        """Weights of one layer that take part in matrix products."""
        query = self.num_heads * self.head_width
        key_value = self.num_kv_heads * self.head_width
        attention = 2 * self.hidden_size * (query + key_value)
        return attention + 3 * self.hidden_size * self.intermediate_size

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that take part in matrix products: the layers' and the head's."""
        return (
            self.num_layers * self.num_layer_matmul_parameters + self.vocab_size * self.hidden_size
        )

    @property
    def num_parameters(self) -> int:
        """All weights; with tied embeddings the head is the embedding and counts once."""
        norms = (2 * self.num_layers + 1) * self.hidden_size
        embedding = 0 if self.tie_embeddings else self.vocab_size * self.hidden_size
        return self.num_matmul_parameters + norms + embedding

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations to train on one token, causal, without recomputation.

        In rows of ``seq_len`` tokens, where no document is longer than ``max_seq_len``.
        """
        reach = min(seq_len, self.max_seq_len)
        attention = 6 * self.num_layers * self.num_heads * self.head_width * reach
        return float(6 * self.num_matmul_parameters + attention)

    def to_hf(
        self,
        *,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
    ) -> LlamaConfig:
        """Return a fresh transformers configuration; transformers changes the ones it is given."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_width,
            max_position_embeddings=self.max_seq_len,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.norm_eps,
            tie_word_embeddings=self.tie_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
        )


@configuration
class InitConfig:
    """How the initial weights are drawn, and how models of the run are stored.

    Errors:
        ValueError: ``std`` is not above 0.
    """

    std: float
    """Standard deviation of the normal distribution that matrices are drawn from."""
    scale_residual: bool
    """Divide the spread of the matrices that write into the residual by sqrt(2 x layers)."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights in the run's model folders."""

    def __post_init__(self) -> None:
        """Refuse a spread that draws nothing."""
        if not self.std > 0:
            raise ValueError(f"std is {self.std}; it must be above 0")


@configuration
class KernelConfig:
    """Which optional kernels to use; at most one of the two.

    ``auto`` is what was measured to be fastest on the kind of GPU there is: `kernels.FASTEST`.
    """

    liger: bool | Literal["auto"]
    cce: bool | Literal["auto"]

    def __post_init__(self) -> None:
        """Refuse both at once."""
        if self.liger is True and self.cce is True:
            raise ValueError("liger and cce are mutually exclusive; set one of them to false")


@configuration
class LoRAAdapterConfig:
    """Shape of an adapter.

    ``targets`` is ``all-linear`` (every linear module but the head) or a list of module names,
    such as ``q_proj``; ``r`` is the rank, ``alpha / r`` the factor on the adapter's output, with
    ``use_rslora`` ``alpha / sqrt(r)``. ``use_dora`` (DoRA) learns the length of each weight row
    besides.
    """

    r: Annotated[int, Field(ge=1)]
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: Literal["all-linear"] | tuple[str, ...]
    use_rslora: bool = False
    use_dora: bool = False

    def num_parameters(self, model: ModelConfig) -> int:
        """Weights that this adapter adds to ``model``: r rows and r columns a target, and lengths.

        On every linear module of Llama's layers, the usual case, or those of them in ``targets``.
        """
        query = model.num_heads * model.head_width
        key_value = model.num_kv_heads * model.head_width
        sides = {
            "q_proj": (model.hidden_size, query),
            "k_proj": (model.hidden_size, key_value),
            "v_proj": (model.hidden_size, key_value),
            "o_proj": (query, model.hidden_size),
            "gate_proj": (model.hidden_size, model.intermediate_size),
            "up_proj": (model.hidden_size, model.intermediate_size),
            "down_proj": (model.intermediate_size, model.hidden_size),
        }
        chosen = [v for k, v in sides.items() if self.targets == "all-linear" or k in self.targets]
        added = [self.r * (ins + outs) + outs * self.use_dora for ins, outs in chosen]
        return model.num_layers * sum(added)


def from_hf(config: PretrainedConfig) -> ModelConfig:
    """Describe a transformers model; exact for Llama's family, near for other dense decoders.

    Both spellings of the rotary base are read: ``rope_parameters`` of transformers 5 and the
    older ``rope_theta``.

    Errors:
        UsageError: the model is no decoder of this kind.
    """
    try:
        return _described(config)
    except (AttributeError, TypeError, ValueError) as error:
        raise UsageError(
            f"model type '{config.model_type}' is no decoder that can be described here ({error}); "
            "start from a Llama-style causal model"
        ) from error


def describe_folder(folder: Path) -> ModelConfig:
    """Return the sizes of the model in a Hugging Face folder, from its config.json alone.

    Errors:
        UsageError: it is no such folder, or no decoder that can be described.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no config.json; name a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{folder / 'config.json'}: not one that transformers knows ({reason}); name the "
            "folder of a causal language model"
        ) from error
    return from_hf(config)


def _described(config: PretrainedConfig) -> ModelConfig:
    text: Any = config.get_text_config(decoder=True)
    hidden_size, num_heads = text.hidden_size, text.num_attention_heads
    head_dim = getattr(text, "head_dim", None)
    rope = getattr(text, "rope_parameters", None) or {}
    theta = rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10_000.0
    epsilon = getattr(text, "rms_norm_eps", None) or getattr(text, "layer_norm_epsilon", None)
    return ModelConfig(
        vocab_size=text.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden_size,
        num_layers=text.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or num_heads,
        max_seq_len=text.max_position_embeddings,
        rope_theta=float(theta),
        norm_eps=float(epsilon or 1e-5),
        tie_embeddings=bool(config.tie_word_embeddings),
        head_dim=None if head_dim in (None, hidden_size / num_heads) else head_dim,
    )


def read_model_file(path: Path) -> ModelConfig:
    """Run a Python file that sets ``MODEL = ModelConfig(...)`` and return that.

    Errors:
        UsageError: there is no such file, it does not run, or MODEL is missing or something else.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; name a Python file that sets MODEL")
    try:
        names = runpy.run_path(str(path))
    except (ArithmeticError, ImportError, LookupError, NameError, SyntaxError) as error:
        raise UsageError(f"{path}: does not run: {error}; correct the file") from error
    except (AttributeError, TypeError, ValueError) as error:
        reason = str(error).replace("ModelConfig.__init__() ", "")
        raise UsageError(f"{path}: MODEL is not a valid ModelConfig: {reason}") from error
    if "MODEL" not in names:
        raise UsageError(f"{path}: sets no MODEL; add MODEL = ModelConfig(...)")
    model = names["MODEL"]
    if not isinstance(model, ModelConfig):
        raise UsageError(
            f"{path}: MODEL is {type(model).__name__}; expected a ModelConfig from "
            "sevenfold.model.config"
        )
    return model
