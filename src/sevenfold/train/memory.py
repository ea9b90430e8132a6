"""How much of a GPU's memory a stage takes, counted from what layers compiled one by one keep.

What a compiled layer keeps for its backward pass is read from the graph that torch.compile cuts in
two (a test does that for each precision and for adapters): its input, queries, keys, values and
attention's output with its log-sums, the half of the residual that attention adds, both normed
inputs, gate, up and their product. Residual sums, casts, rotations and norms are computed again.

Letters: n tokens of a micro-batch, h hidden size, f the MLP's width, q and k widths of queries and
of keys, v vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import Literal

from sevenfold.model.config import ModelConfig
from sevenfold.train.config import TrainConfig

GIB = 2**30
BYTES = {"fp32": 4, "bf16": 2, "fp8": 2, "fp8_torchao": 2}
# Two moments of fp32; two of 8 bits with an fp32 scale for every 256 values.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw_8bit": 2 + 2 * 4 / 256}
# NF4: half a byte, a scale of one byte for 64 weights and one of four bytes for 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# The 8-bit optimizer's step works in fp32, tensor by tensor: two copies of the largest.
OPTIMIZER_STEP_BYTES = {"adamw": 0.0, "adamw_8bit": 8.0}
# cuBLAS's workspace on Hopper; it is taken from PyTorch's allocator.
OVERHEAD_GIB = 1 / 32
# Positions whose logits' gradients are multiplied at a time; logits are kept for all of them.
CHUNK_POSITIONS = 8192

LossKernel = Literal["plain", "chunked", "cce"]
Precision = Literal["fp32", "bf16", "fp8", "fp8_torchao"]

# Which modules of a layer read its normed inputs, attention's output, and the MLP's product.
READERS = {
    "attention": {"q_proj", "k_proj", "v_proj"},
    "mlp": {"gate_proj", "up_proj"},
    "product": {"down_proj"},
}
ALL_TARGETS = frozenset({"o_proj"}.union(*READERS.values()))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Memory of one GPU at one context length, by part, in GiB."""

    seq_len: int
    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    gathered_gib: float
    activations_gib: float
    loss_gib: float
    overhead_gib: float
    peak_gib: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter on a frozen model: weights trained, rank, and the modules that have one."""

    num_parameters: int
    rank: int = 0
    targets: Collection[str] = ALL_TARGETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demand:
    """What decides the memory of a stage.

    ``scored_share`` of the positions go through the head, those that carry loss. Of ``world_size``
    GPUs, ``per_node`` (None: all) are in a node; `layout.lay_out` says how they hold the model.
    Where weights are ``replicated``, each has whole ones and whole gradients, and a share of the
    moments; else each of ``copies`` of the model is sharded over its part of the GPUs, and whether
    its layers' weights stay gathered from forward to backward is ``stays_gathered``.
    """

    model: ModelConfig
    train: TrainConfig
    precision: Precision
    world_size: int = 1
    loss_kernel: LossKernel = "chunked"
    compiled: bool = True
    adapter: Adapter | None = None
    four_bits: bool = False
    scored_share: float = 1.0
    per_node: int | None = None
    replicated: bool = False
    copies: int = 1
    stays_gathered: bool = False

    @property
    def num_shards(self) -> int:
        """GPUs that weights and gradients are sharded over."""
        return 1 if self.replicated else self.world_size // self.copies

    @property
    def peak_gib(self) -> float:
        """The planned peak over all context lengths."""
        lengths = {phase.length for phase in self.train.contexts}
        return max(self.memory(length).peak_gib for length in lengths)

    @property
    def micro_batches_per_step(self) -> int:
        """Forward passes of one process per optimizer step."""
        per_forward = self.train.rows_at_once * self.train.longest_context * self.world_size
        return max(1, math.ceil(self.train.tokens_per_batch / per_forward))

    @property
    def compute_bytes(self) -> int:
        """Bytes of one activation."""
        return BYTES[self.precision]

    @property
    def under_autocast(self) -> bool:
        """True where fp32 weights are cast when they are used; FSDP2 casts all inputs instead."""
        return self.train.weights == "fp32" and self.precision != "fp32" and self.world_size == 1

    @property
    def residual_bytes(self) -> int:
        """Bytes of one value of the residual stream, which autocast leaves in fp32."""
        return 4 if self.under_autocast else self.compute_bytes

    @property
    def adds_in_products(self) -> bool:
        """True where weight gradients are added up in memory that is always there."""
        in_bf16 = self.precision == self.train.weights == "bf16"
        return in_bf16 and self.num_shards == 1 and self.adapter is None

    def memory(self, seq_len: int) -> MemoryPlan:
        """Return the parts and the peak at ``seq_len``.

        The backward pass begins with everything that the forward pass has kept; on its way
        activations go and, with the first micro-batch of a step, gradients come.
        """
        model, adapter = self.model, self.adapter
        # Rows of a shorter context are so many more that a forward holds as many tokens.
        longest = self.train.longest_context
        tokens = max(1, self.train.rows_at_once * longest // seq_len) * seq_len
        trained = adapter.num_parameters if adapter else model.num_parameters
        kind = self.train.optimizer.kind
        # FSDP2 keeps sums of gradients in fp32 until they pass between copies.
        gradient_bytes = 4 if adapter or self.copies > 1 else BYTES[self.train.weights]
        num_updating = self.world_size // self.copies
        weights = self._weight_bytes() / self.num_shards
        gradients = trained * gradient_bytes / self.num_shards
        states = trained * OPTIMIZER_BYTES[kind] / num_updating
        gathered, loss = self._gathered_bytes(), self._loss_bytes(tokens)
        layer = tokens * self.layer_bytes_per_token()
        activations = model.num_layers * layer
        if self.train.recompute is True:
            # Every layer keeps its input; one layer at a time is computed again.
            per_token = model.num_layers * model.hidden_size * self.residual_bytes
            activations = tokens * per_token + layer
        inside = self._inside_layer_bytes(tokens)
        embedding = model.vocab_size * model.hidden_size
        head_gradient = 0.0 if adapter else embedding * gradient_bytes / self.num_shards
        present = self.micro_batches_per_step > 1 or self.adds_in_products
        before = gradients if present else 0.0
        # A tied head's gradient waits for the embedding's.
        waiting = 0.0 if present and not model.tie_embeddings else head_gradient
        beginning = before + activations + max(loss, waiting + inside)
        ending = gradients + min(activations, layer) + inside
        largest = min(embedding, trained)
        updating = gradients + OPTIMIZER_STEP_BYTES[kind] * largest / num_updating
        if self.replicated:
            # All processes' parts of the largest gradient's rows, and their sum in fp32.
            exchanging = largest * (gradient_bytes + 4 / num_updating)
            updating = max(updating, gradients + exchanging)
        static = weights + states + OVERHEAD_GIB * GIB
        peak = static + max(gathered + max(beginning, ending), updating)
        return MemoryPlan(
            seq_len=seq_len,
            weights_gib=weights / GIB,
            gradients_gib=gradients / GIB,
            optimizer_gib=states / GIB,
            gathered_gib=gathered / GIB,
            activations_gib=(activations + inside) / GIB,
            loss_gib=loss / GIB,
            overhead_gib=OVERHEAD_GIB,
            peak_gib=peak / GIB,
        )

    def _weight_bytes(self) -> float:
        """Bytes of all weights; an adapter's are fp32 beside the frozen ones."""
        model, each = self.model, BYTES[self.train.weights]
        saved = 0.0
        if self.four_bits:
            saved = model.num_layers * model.num_layer_matmul_parameters * (each - NF4_BYTES)
        added = 4 * self.adapter.num_parameters if self.adapter else 0
        return model.num_parameters * each - saved + added

    def _gathered_bytes(self) -> float:
        """Bytes of weights that exist a second time while computing."""
        model, compute = self.model, self.compute_bytes
        if self.precision == "fp8":
            # Every layer's weights are kept in 8 bits, frozen ones as their transposes, too; the
            # head's are cast where they are fp32.
            head = model.vocab_size * model.hidden_size if self.train.weights == "fp32" else 0
            forms = 1 if self.adapter is None else 2
            return float(forms * model.num_layers * model.num_layer_matmul_parameters + 2 * head)
        if self.four_bits:
            # One matrix at a time is made anew from its four bits.
            return float(model.hidden_size * model.intermediate_size * compute)
        if self.num_shards == 1:
            # Autocast keeps a bf16 copy of every fp32 weight from forward to backward.
            return float(model.num_matmul_parameters * 2) if self.under_autocast else 0.0
        # FSDP2: the root's weights stay whole, two layers are whole at a time or all of them
        # (torchao's FP8 is gathered as such), and one layer's gradient is whole in fp32 while it
        # is being summed.
        root = model.num_parameters - model.num_layers * model.num_layer_matmul_parameters
        layers = 2 * compute
        if self.stays_gathered:
            layers = model.num_layers * (1 if self.precision == "fp8_torchao" else compute)
        return float(root * compute + model.num_layer_matmul_parameters * (layers + 4))

    def layer_bytes_per_token(self) -> float:
        """Bytes that one token leaves in one layer.

        In FP8 the normed inputs are kept in 8 bits, the others are cast again, and SwiGLU's product
        is computed again. Cheap recomputation keeps neither normed inputs nor the product. Of a
        frozen model only what an adapter reads is kept of these, and what each adapter holds
        between its two matrices.
        """
        model, compute, adapter = self.model, self.compute_bytes, self.adapter
        h, f = model.hidden_size, model.intermediate_size
        q, k = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
        kept = compute * (2 * q + 2 * k) + 4 * model.num_heads
        kept += self.residual_bytes * h + compute * (h + 2 * f) + 2 * 4
        if adapter is not None:
            read = {name for name, by in READERS.items() if by & set(adapter.targets)}
            kept += compute * adapter.rank * len(adapter.targets)
        else:
            read = set(READERS)
        if adapter is None and self.precision.startswith("fp8"):
            kept += 2 * h
        elif self.train.recompute != "cheap":
            kept += compute * (h * len(read & {"attention", "mlp"}) + f * ("product" in read))
        if not self.compiled:
            # Eager norms keep their fp32 input and their normalised values, eager SwiGLU its silu.
            kept += (12 * h if compute == 2 else 8 * h) + compute * f
        return float(kept)

    def _inside_layer_bytes(self, tokens: int) -> float:
        """Bytes in the backward pass of one layer.

        Gradients of gate, up, their product and the residual; of gate's and up's weights where
        these are there until they are added up at the layer's end.
        """
        model, compute = self.model, self.compute_bytes
        h, f = model.hidden_size, model.intermediate_size
        of_weights = 0 if self.adapter or self.adds_in_products else 2 * h * f * compute
        return float(tokens * (3 * f * compute + h * self.residual_bytes) + of_weights)

    def _loss_bytes(self, tokens: int) -> float:
        """Bytes at the head, where its gradients are computed.

        The norm before it is not compiled: its input, normalised values, output and gradient; in
        bf16 its input once more in fp32. Then the logits, and of the head's weight the gradient of
        one chunk of positions, as computed and as added up.
        """
        model, compute = self.model, self.compute_bytes
        hidden = tokens * model.hidden_size * (16 if self.residual_bytes == 4 else 10)
        head = model.vocab_size * model.hidden_size
        positions = min(tokens, math.ceil(tokens * self.scored_share))
        weight_bytes = BYTES[self.train.weights]
        parts = 1 if self.loss_kernel != "chunked" else math.ceil(positions / CHUNK_POSITIONS)
        of_head = head * (compute + weight_bytes * ((weight_bytes != compute) + (parts > 1)))
        if self.adapter is not None:
            of_head = 0
        if self.loss_kernel == "cce":
            return float(hidden + of_head)
        # Plain: logits, their fp32 copy, log-probabilities. Else logits, which become gradients.
        per_logit = compute + 8 if self.loss_kernel == "plain" else compute
        return float(hidden + positions * model.vocab_size * per_logit + of_head)
