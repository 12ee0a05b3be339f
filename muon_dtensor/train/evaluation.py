"""Perplexity, BLEU and ROUGE of a model on test rows, shared over data-parallel ranks."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig

from muon_dtensor.train.masked import IGNORED, MaskedBatches
from muon_dtensor.train.ranks import is_rank_0


@dataclass(frozen=True)
class Part:
    """Which rows this rank computes: every `count`-th, from `index`.

    Ranks of one TP group have the same part.
    """

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, tp: int) -> "Part":
        """Return the part of this rank, where TP is the innermost mesh dim."""
        if not dist.is_initialized():
            return cls()
        return cls(dist.get_rank() // tp, dist.get_world_size() // tp)

    def batches(self, num_rows: int, batch_size: int) -> Iterator[list[int]]:
        """Yield lists of row numbers; the same number of lists on all ranks, some empty.

        A sharded model needs all ranks in every forward pass.
        """
        indices = list(range(self.index, num_rows, self.count))
        num_batches = math.ceil(math.ceil(num_rows / self.count) / batch_size)
        for batch in range(num_batches):
            yield indices[batch * batch_size : (batch + 1) * batch_size]


def perplexity(
    model: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    part: Part,
    batch_size: int,
    pad_id: int,
    shift: bool = True,
) -> dict[str, float]:
    """Return `loss` (nats per token), `perplexity` = exp(loss) and `tokens`, over all ranks.

    The mean is over tokens, so that it does not depend on how rows are shared. A collective of all
    ranks.

    Args:
        model: of transformers, in any layout.
        rows: {"input_ids", "labels"}, lists of equal length; label -100: no loss.
        part: of this rank.
        batch_size: rows of a forward pass.
        pad_id: token that fills rows to equal length.
        shift: whether the label of a position is predicted by the position before (causal models).
    """
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    with _evaluating(model):
        for batch in part.batches(len(rows), batch_size):
            # an empty batch is one row without labels
            examples = [rows[i] for i in batch] or [
                {"input_ids": [pad_id, pad_id], "labels": [IGNORED, IGNORED]}
            ]
            ids = _padded([e["input_ids"] for e in examples], pad_id, device)
            labels = _padded([e["labels"] for e in examples], IGNORED, device)
            mask = _padded([[1] * len(e["input_ids"]) for e in examples], 0, device)
            if not batch:
                mask = torch.ones_like(ids)
            logits = _full(model(input_ids=ids, attention_mask=mask).logits)
            logits = logits.float()  # [rows, tokens, vocabulary]
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            loss = F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED
            )
            sums += torch.stack([loss.double().sum(), (labels != IGNORED).sum().double()])
    copies = 1
    if dist.is_initialized():
        dist.all_reduce(sums)
        copies = dist.get_world_size() // part.count
    total, tokens = sums.tolist()
    loss = total / max(tokens, 1.0)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": tokens / copies,
    }


@dataclass(frozen=True)
class Answer:
    """A generated answer to a test row."""

    row: int
    prompt: str
    answer: str
    reference: str


def generate_answers(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    part: Part,
    batch_size: int,
    max_new_tokens: int,
) -> list[Answer]:
    """Return the greedy answer to every row, in order, on all ranks. A collective of all ranks.

    The prompt of a conversation ends before its last message of the assistant, the reference.

    Args:
        model: of transformers, in any layout.
        tokenizer: with a chat template.
        rows: {"prompt", "completion"} or {"messages"}.
        part: of this rank.
        batch_size: rows that are generated together.
        max_new_tokens: longest answer.
    """
    device = next(model.parameters()).device
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    answers: list[Answer] = []
    with _evaluating(model):
        for batch in part.batches(len(rows), batch_size):
            pairs = [_prompt_and_reference(rows[i]) for i in batch]
            texts = [
                tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
                for prompt, _ in pairs
            ]
            ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
            ids = ids or [[tokenizer.eos_token_id]]
            inputs = _padded(ids, tokenizer.pad_token_id, device, left=True)
            mask = _padded([[1] * len(row) for row in ids], 0, device, left=True)
            output = model.generate(input_ids=inputs, attention_mask=mask, generation_config=config)
            new = output[:, inputs.size(1) :]
            decoded = tokenizer.batch_decode(new, skip_special_tokens=True)
            answers += [
                Answer(row, text, answer.strip(), reference)
                for row, text, answer, (_, reference) in zip(
                    batch, texts, decoded, pairs, strict=False
                )
            ]
    if not dist.is_initialized():
        return answers
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, answers)
    by_row = {answer.row: answer for part_answers in gathered for answer in part_answers}
    return [by_row[row] for row in sorted(by_row)]


def text_scores(answers: Sequence[Answer], metrics: Sequence[str]) -> dict[str, float]:
    """Return the BLEU (0 to 100) and the mean ROUGE F-measures (0 to 1) of answers.

    BLEU is sacrebleu's corpus BLEU with its default tokenizer (Papineni et al. 2002; Post 2018,
    arXiv:1804.08771); ROUGE-1, -2 and -L are rouge-score's, without stemming (Lin 2004).
    """
    scores: dict[str, float] = {}
    hypotheses = [answer.answer for answer in answers]
    references = [answer.reference for answer in answers]
    if "bleu" in metrics:
        import sacrebleu

        scores["bleu"] = float(sacrebleu.corpus_bleu(hypotheses, [references]).score)
    if "rouge" in metrics:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
        results = [scorer.score(r, h) for r, h in zip(references, hypotheses, strict=True)]
        for name in ("rouge1", "rouge2", "rougeL"):
            values = [result[name].fmeasure for result in results]
            scores[name] = sum(values) / max(len(values), 1)
    return scores


class Evaluation:
    """Evaluates a trainer's model on the test rows."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.step = -1
        self.metrics: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        """Return `eval_...` metrics of the model, and log them; once for each step."""
        trainer, job = self.trainer, self.trainer.job
        if self.step == trainer.state.global_step or job.split.test is None:
            return self.metrics
        section = job.config.evaluation
        seconds = time.perf_counter()
        self.metrics = {
            f"eval_{name}": value
            for name, value in perplexity(
                trainer.model,
                _test_rows(trainer),
                part=job.part,
                batch_size=section.batch_size,
                pad_id=job.tokenizer.pad_token_id,
                shift=job.config.task != "mlm",
            ).items()
        }
        if set(section.metrics) - {"perplexity"}:
            rows = job.split.test.select(range(min(section.samples, len(job.split.test))))
            answers = generate_answers(
                trainer.model,
                job.tokenizer,
                list(rows),
                part=job.part,
                batch_size=section.batch_size,
                max_new_tokens=section.max_new_tokens,
            )
            scores = text_scores(answers, section.metrics)
            self.metrics |= {f"eval_{name}": value for name, value in scores.items()}
            lines = [json.dumps(dataclasses.asdict(answer)) + "\n" for answer in answers]
            path = Path(job.config.output) / "answers.jsonl"
            with contextlib.suppress(OSError):  # a full disk does not end a run; saves report it
                if is_rank_0():
                    path.write_text("".join(lines))
        self.step = trainer.state.global_step
        was_training = trainer.model.training
        trainer.model.eval()  # in training mode SFTTrainer adds its metrics of training
        trainer.log({**self.metrics, "eval_seconds": time.perf_counter() - seconds})
        trainer.model.train(was_training)
        return self.metrics


def _test_rows(trainer: Any) -> list[dict[str, Any]]:
    """Return the tokenized test rows; for masked models, with the same masks on every call."""
    rows = trainer.eval_dataset
    if trainer.job.config.task != "mlm":
        return [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
    collator = MaskedBatches(trainer.job.tokenizer, trainer.args.seed)
    batches = [collator([row]) for row in rows]
    return [
        {name: batch[name][0].tolist() for name in ("input_ids", "labels")} for batch in batches
    ]


def _prompt_and_reference(row: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
    """Return the messages before the last answer of a row, and that answer."""
    if "completion" in row:
        return list(row["prompt"]), row["completion"][-1]["content"]
    messages = list(row["messages"])
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last], messages[last]["content"]


def _padded(
    rows: Sequence[Sequence[int]], value: int, device: torch.device, *, left: bool = False
) -> Tensor:
    """Return rows as one tensor [rows, longest], filled with a value."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    lists = [
        [*padding, *row] if left else [*row, *padding]
        for row, padding in zip(rows, fill, strict=True)
    ]
    return torch.tensor(lists, dtype=torch.long, device=device)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A context without gradients and dropout. Afterwards FSDP2's parameters are sharded again."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
