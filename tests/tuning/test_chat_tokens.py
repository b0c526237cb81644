"""Tokens of chats for training: before an answer those of inference, and the answer's whole."""

import itertools

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from yoco_u.inference.chat_template import chat_text, chat_tokens, text_tokens
from yoco_u.tuning import Chat, examples

KINDS = ("bytes", "bytes, trimmed", "blank always", "blank first", "blank of old")
PROMPTS = ("<assistant>", "assistant:", "assistant: ", "assistant:\\n", "a:  ")
ANSWERS = ("hello there", " hello", "\nhello", "a", "")


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """One with long tokens, some of which begin with blanks and line ends."""
    backend, alphabet = Tokenizer(models.BPE()), list[str]()
    if request.param.startswith("bytes"):
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.post_processor = processors.ByteLevel(trim_offsets="trimmed" in request.param)
    elif request.param == "blank of old":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=request.param.split()[1], split=False)
    texts = [f"user: hi\n{prompt}{answer}</s>user: why" for prompt in PROMPTS for answer in ANSWERS]
    plain = [text.replace("\\n", "\n").replace("</s>", "") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator([*plain, ".", "<assistant>"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def written(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> str:
    """What tokens say, with each blank."""
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel):
        return tokenizer.decode(ids)
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ")


@pytest.mark.parametrize(("prompt", "answer"), itertools.product(PROMPTS, ANSWERS))
def test_an_answer_has_tokens_of_its_own_behind_those_of_its_prompt(
    tokenizer: PreTrainedTokenizerFast, prompt: str, answer: str
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}user: {{ m.content }}\n"
        f"{{% else %}}{prompt}{{{{ m.content }}}}</s>{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )
    asked = {"role": "user", "content": "hi"}
    messages = [asked, {"role": "assistant", "content": answer}, asked, {"role": "assistant", "content": "a"}]
    [found] = examples([Chat("here", messages)], tokenizer)
    first = found.assistant.index(True)
    assert found.input_ids[:first] == chat_tokens(tokenizer, messages[:1])
    own = [[token for token, _ in run] for is_own, run in itertools.groupby(zip(*found, strict=True), lambda x: x[1]) if is_own]
    assert [written(tokenizer, run) for run in own] == [f"{answer}</s>", "a</s>"]
    text = chat_text(tokenizer, messages, generation_prompt=False)
    assert written(tokenizer, found.input_ids) == written(tokenizer, text_tokens(tokenizer, text))
