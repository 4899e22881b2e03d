"""The same distillation in PyTorch, written to be compared with: the models of transformers.

Masked batches come in, one update of the student goes out. Imported by the benchmark alone, and
only there, because PyTorch is optional (the extra `parity`).
"""

import os
import time

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from distilbert_jax.config import DistilConfig, compute_dtype
from distilbert_jax.models import bert, distilbert
from distilbert_jax.models.encoder import EncoderConfig

IGNORED = -100  # label of a position that is not predicted
PRODUCT = 2048  # rows and columns of the matrices whose product is timed


class TorchLoop:
    """A frozen BertForMaskedLM, a DistilBertForMaskedLM in training, and its optimizer.

    Attention is PyTorch's scaled_dot_product_attention, AdamW its fused one. The losses are the
    formulas of the original (Sanh et al. 2019): softmaxes of all real positions at once.
    """

    def __init__(
        self, teacher: EncoderConfig, student: EncoderConfig, config: DistilConfig,
        batches: list[dict[str, np.ndarray]], compiled: bool = False,
    ):
        """Random models of these shapes, on the GPU if there is one, else on all cores.

        Args:
            teacher, student: shapes.
            config: weights of ce, mlm and cos, the temperature, the rate, which falls to 0 without
                a warm-up, clip and dtype; bfloat16 is the teacher in it, the student under
                autocast.
            batches: one document a row, from mask_tokens.
            compiled: whether models and losses go through torch.compile.
        """
        self.platform = "gpu" if torch.cuda.is_available() else "cpu"
        self._device = "cuda" if self.platform == "gpu" else "cpu"
        self.devices = 1
        self.dtype = compute_dtype(config.dtype, self.platform)
        self._narrow = getattr(torch, self.dtype)
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high" if self.dtype == "bfloat16" else "highest")
        teacher_config = transformers.BertConfig(**bert.FAMILY.to_hf(teacher))
        student_config = transformers.DistilBertConfig(**distilbert.FAMILY.to_hf(student))
        self.teacher = transformers.BertForMaskedLM(teacher_config).eval()
        self.teacher.to(self._device, self._narrow)
        self.student = transformers.DistilBertForMaskedLM(student_config).train()
        self.student.to(self._device)
        self._config = config
        self._optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), eps=1e-6,
            weight_decay=config.weight_decay, fused=True)
        self._schedule = torch.optim.lr_scheduler.LinearLR(
            self._optimizer, start_factor=1.0, end_factor=0.0, total_iters=config.steps)
        self._losses = torch.compile(self.losses) if compiled else self.losses
        self._batches = [self._place(batch) for batch in batches]
        self._factor = torch.randn(PRODUCT, PRODUCT, device=self._device).to(self._narrow)

    def update(self, number: int) -> dict[str, torch.Tensor]:
        """One update on the batch of this number; its losses, which may not be there yet."""
        means = self._losses(*self._batches[number])
        total = sum(self._config.alphas[name] * x for name, x in means.items())
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), self._config.clip)
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        return {name: mean.detach() for name, mean in means.items()}

    def _place(self, batch: dict[str, np.ndarray]) -> tuple[torch.Tensor | None, ...]:
        """Ids, attention mask and labels [B, T] on the device, T being the longest row's length.

        There is no mask where nothing is padding.
        """
        lengths = (batch["segment_ids"] > 0).sum(1)
        labels = np.full(batch["input_ids"].shape, IGNORED)
        row, number = np.nonzero(batch["label_weights"])
        labels[row, batch["masked_positions"][row, number]] = batch["labels"][row, number]
        width = lengths.max()
        real = np.arange(width) < lengths[:, None]
        arrays = (batch["input_ids"][:, :width].astype(np.int64), None if real.all() else real,
                  labels[:, :width])
        return tuple(None if x is None else torch.from_numpy(x).to(self._device) for x in arrays)

    def losses(
        self, ids: torch.Tensor, real: torch.Tensor | None, labels: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The means ce, mlm and cos of a batch [B, T]."""
        with torch.no_grad():
            teacher = self.teacher(ids, attention_mask=real, output_hidden_states=True)
        with torch.autocast(self._device, self._narrow, enabled=self._narrow != torch.float32):
            student = self.student(ids, attention_mask=real, output_hidden_states=True)

        def at_real(x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(0, 1) if real is None else x[real]).float()  # [P, V] or [P, D]

        ours, theirs = at_real(student.logits), at_real(teacher.logits)
        hidden, target = (at_real(x.hidden_states[-1]) for x in (student, teacher))
        temperature = self._config.temperature
        return {
            "ce": temperature**2 * F.kl_div(
                F.log_softmax(ours / temperature, -1), F.softmax(theirs / temperature, -1),
                reduction="batchmean"),
            "mlm": F.cross_entropy(
                ours, labels.flatten() if real is None else labels[real], ignore_index=IGNORED),
            "cos": F.cosine_embedding_loss(hidden, target, hidden.new_ones(len(hidden)))}

    def product(self) -> float:
        """FLOP/s of the product of two square matrices."""
        began = time.perf_counter()
        torch.mm(self._factor, self._factor)
        if self.platform == "gpu":
            torch.cuda.synchronize()
        return 2 * PRODUCT**3 / (time.perf_counter() - began)

    def memory(self) -> tuple[int, int]:
        """Peak of a GPU's memory [bytes]; what a compiler would say is not known."""
        return (torch.cuda.max_memory_allocated() if self.platform == "gpu" else 0), 0
