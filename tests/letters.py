"""A tiny target over single letters, prompts for it, and a training that takes a second."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from mirror.distill.data import DataOptions  # noqa: E402
from mirror.distill.run import DistillOptions  # noqa: E402
from mirror.distill.train import TrainOptions  # noqa: E402

torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<u>{{ m['content'] }}<e>{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
LETTERS = "abcdefghijklmnopqrstuvwxyz ?.\n:"


def make_model(folder: Path, seed: int = 0) -> Path:
    """Write a llama of 6 layers over single letters, taught to count through the alphabet."""
    words = ["<pad>", "<u>", "<a>", "<e>", "<unk>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(["<u>", "<a>", "<e>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", chat_template=TEMPLATE)
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=512, eos_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        start = torch.randint(0, 26, (32, 1))
        step = torch.randint(1, 4, (32, 1))
        ids = 5 + (start + step * torch.arange(24)) % 26
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


def write_prompts(path: Path) -> Path:
    """Write sixty short prompts."""
    texts = [LETTERS[i % 26 : i % 26 + 4] + LETTERS[i % 7] * (i % 5) for i in range(60)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def options(prompt_file: Path, cache: Path, **train: object) -> DistillOptions:
    data = DataOptions(files=(prompt_file,), sampled_answers=1.0, max_answer_tokens=24, rows=16, jobs_per_shard=32)
    settings = TrainOptions(
        steps=80, tokens_per_batch=512, warmup_steps=4, measure_every=20, draft_lr=5e-3, head_lr=5e-3
    )
    return DistillOptions(
        exit_layers=(2, 4),
        draft_layers=(0, 5),
        adapter_sizes=(16,),
        streams=2,
        held_out_share=0.2,
        device="cpu",
        cache=cache,
        data=data,
        train=dataclasses.replace(settings, **train),
    )
