"""Continue a prompt with a model, within its context."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepfusion import progress
from deepfusion.errors import InputError
from deepfusion.models.loading import context_limit


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> tuple[str, int]:
    """What a model says after a prompt, and how many tokens that are.

    Args:
        prompt: may be empty.
        max_new_tokens: fewer where the context ends before; a line says so.
        temperature: 0 takes the likeliest token each time.

    Raises:
        InputError: the prompt is no text, or leaves no room in the context.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError(
            "the prompt is not valid UTF-8", fix="give it as UTF-8 text", code="bad-text"
        ) from None
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor(
        [[start, *tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids]], device=model.device
    )
    context = context_limit(model) or ids.shape[1] + max_new_tokens
    room = context - ids.shape[1]
    if room < 1:
        what = f"the prompt takes {ids.shape[1]} tokens, and the context of the model {context}"
        raise InputError(
            what,
            allowed=f"at most {context} with what is to come",
            fix="a shorter prompt",
            code="long-prompt",
        )
    if room < max_new_tokens:
        progress.say(f"the context of {context} tokens leaves room for {room} of {max_new_tokens} new ones")
    torch.manual_seed(seed)
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    generate: Any = model.eval().generate
    with torch.inference_mode():
        output: torch.Tensor = generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(max_new_tokens, room),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id, **sampling,
        )  # fmt: skip
    found = output[0, ids.shape[1] :]
    return str(tokenizer.decode(found, skip_special_tokens=True)), len(found)
