"""Small data to try a training run: questions about Python, made from its standard library."""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}
{{- '\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML. Tokens between `generation` markers are the ones that `assistant_only_loss` trains."""

CONFIGS = {
    "sft.yaml": """\
# Fine-tuning on questions and answers: 4 processes, a mesh of fsdp=2 x tp=2.
task: sft
output: {folder}/sft-output
model:
  config: {{model_type: llama, hidden_size: 64, intermediate_size: 160, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}}
  tokenizer: {folder}/tokenizer
data: {{train: {folder}/questions.jsonl, test: 0.02, format: alpaca}}
optimizer: {{lr: 0.02, adamw: {{lr: 3.0e-3}}}}
parallelism: {{dp_shard: 2, tp: 2}}
training: {{max_steps: 60, per_device_train_batch_size: 8, max_length: 128, warmup_steps: 5}}
evaluation: {{every: 30, metrics: [perplexity, bleu, rouge], max_new_tokens: 32, samples: 16}}
checkpoint: {{every: 20}}
""",
    "pretrain.yaml": """\
# Pretraining on plain text, packed to full sequences: 2 processes, FSDP.
task: pretrain
output: {folder}/pretrain-output
model:
  config: {{model_type: llama, hidden_size: 64, intermediate_size: 160, num_hidden_layers: 4,
           num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}}
  tokenizer: {folder}/tokenizer
data: {{train: {folder}/text.txt, test: 0.02, format: text}}
optimizer: {{lr: 0.02, adamw: {{lr: 3.0e-3}}}}
parallelism: {{dp_shard: 2}}
training: {{max_steps: 60, per_device_train_batch_size: 8, max_length: 128, packing: true,
           packing_strategy: wrapped}}
evaluation: {{every: 30}}
checkpoint: {{every: 20}}
""",
    "lora.yaml": """\
# Adapters (LoRA) on conversations, for the model that sft.yaml has exported: 1 process.
task: sft
output: {folder}/lora-output
model: {{path: {folder}/sft-output/model, lora: {{r: 8, target_modules: all-linear}}}}
data: {{train: {folder}/conversations.jsonl, test: 0.02, format: sharegpt}}
optimizer: {{lr: 0.02}}
training: {{max_steps: 30, per_device_train_batch_size: 8, max_length: 128,
           assistant_only_loss: true}}
evaluation: {{every: 15, metrics: [perplexity, rouge], max_new_tokens: 32, samples: 16}}
checkpoint: {{every: 10}}
""",
}
"""Configs by file name; `folder` is that of the data."""


def make_sample_data(folder: str | Path, *, vocab_size: int = 2048) -> Path:
    """Write data files, a tokenizer and three configs into a folder; return the folder.

    Args:
        folder: created if it does not exist.
        vocab_size: of the tokenizer, a byte-level BPE trained on the texts.
    """
    folder = Path(folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    questions = sorted(_questions())
    texts = [" ".join(topics[name].split()) for name in sorted(topics)]
    _write_lines(
        folder / "questions.jsonl",
        (json.dumps({"instruction": q, "input": "", "output": a}) for q, a in questions),
    )
    pairs = zip(questions[::2], questions[1::2], strict=False)
    _write_lines(
        folder / "conversations.jsonl",
        (
            json.dumps(
                {
                    "conversations": [
                        {"from": "human", "value": first[0]},
                        {"from": "gpt", "value": first[1]},
                        {"from": "human", "value": second[0]},
                        {"from": "gpt", "value": second[1]},
                    ]
                }
            )
            for first, second in pairs
        ),
    )
    sentences = [s.strip() + "." for text in texts for s in text.split(". ") if len(s) > 40]
    _write_lines(folder / "text.txt", iter(sentences))
    tokenizer = _tokenizer([f"{q}\n{a}" for q, a in questions] + texts, vocab_size)
    tokenizer.save_pretrained(folder / "tokenizer")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text.format(folder=folder))
    return folder


def _write_lines(path: Path, lines: Iterator[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _questions() -> Iterator[tuple[str, str]]:
    """Yield questions and answers from the docstrings of the standard library's modules."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.name.startswith("_"):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for name, node in _definitions(tree, path.stem):
            doc = ast.get_docstring(node)
            answer = " ".join((doc or "").split("\n\n")[0].split())
            if 20 <= len(answer) <= 300:
                yield f"What does {name} do?", answer


def _definitions(
    node: ast.Module | ast.ClassDef, name: str
) -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield f"{name}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, f"{name}.{child.name}")


def _tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    result = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        mask_token="<|mask|>",
    )
    result.chat_template = CHAT_TEMPLATE
    return result
