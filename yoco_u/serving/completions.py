"""`/v1/completions`: what clients get for it. Its route is in `app.py`, its request in `requests.py`."""

from collections.abc import Iterator

from yoco_u.inference import SamplingParams, TokenLogprobs
from yoco_u.inference.detokenizer import Detokenizer
from yoco_u.serving.answers import Answer
from yoco_u.serving.jobs import Event, Job
from yoco_u.serving.requests import CompletionRequest
from yoco_u.serving.responses import CompletionChoice, CompletionLogprobs, CompletionResponse, Usage
from yoco_u.serving.token_texts import TokenTexts

PIECE = 512  # tokens that are written in one call, in a few milliseconds


class CompletionAnswer(Answer[CompletionChoice]):
    """The answer to a request for completions. With `echo`, each output begins with its prompt."""

    def __init__(self, body: CompletionRequest, job: Job, model_name: str, texts: TokenTexts) -> None:
        super().__init__(body, job, model_name, "cmpl")
        self._prompts, self._echo, self._tokenizer = body.prompts, bool(body.echo), texts.tokenizer
        self.lists = tuple(CompletionLogprobs.model_fields) if body.logprobs is not None else ()
        self._texts, self._writers = texts, dict[int, _LogprobWriter]()

    def choices(self, index: int, event: Event, first: bool) -> Iterator[CompletionChoice]:
        text, tokens = event.text, event.token_ids
        logprobs: list[TokenLogprobs | None] = list(event.logprobs or [])
        if first and self._echo:
            request = self.job.requests[event.prompt]
            text = self._echoed(event.prompt, request.prompt_token_ids) + text
            tokens = request.prompt_token_ids + tokens
            logprobs = (request.prompt_logprobs or []) + logprobs
        if not (self.lists and tokens):
            if text or event.finish_reason is not None:
                yield CompletionChoice(index=index, text=text, finish_reason=event.finish_reason)
            return
        if index not in self._writers:
            prompt = self.job.requests[event.prompt].prompt_token_ids
            self._writers[index] = _LogprobWriter(self._texts, self.job.params, prompt, self._echo)
        for begin in range(0, len(tokens), PIECE):
            end = begin + PIECE
            yield CompletionChoice(
                index=index,
                text=text if begin == 0 else "",
                logprobs=self._writers[index].write(tokens[begin:end], logprobs[begin:end]),
                finish_reason=event.finish_reason if end >= len(tokens) else None,
            )

    def chunk(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(**self.head, choices=choices, usage=usage)

    def whole(self, usage: Usage) -> CompletionResponse:
        return self.chunk([], usage)

    def joined(self, index: int, parts: list[CompletionChoice]) -> CompletionChoice:
        text = "".join(part.text for part in parts)
        return CompletionChoice(index=index, text=text, finish_reason=parts[-1].finish_reason)

    def _echoed(self, prompt: int, tokens: list[int]) -> str:
        """A prompt as text: as it was given, or as its tokens are, where their places are told with their log probabilities."""
        given = self._prompts[prompt]
        if isinstance(given, str) and not self.lists:
            return given
        skip = self.job.params.skip_special_tokens
        return str(self._tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=skip))


class _LogprobWriter:
    """Log probabilities of one output in OpenAI's shape; it keeps count of where in the text each token begins.

    Args:
        prompt: the tokens before the output.
        echo: whether the prompt's tokens are written first, whose text is one of its own.
    """

    def __init__(self, texts: TokenTexts, params: SamplingParams, prompt: list[int], echo: bool) -> None:
        self._texts, self._prompt = texts, prompt
        self._shown = SamplingParams(skip_special_tokens=params.skip_special_tokens)
        self._to_echo = len(prompt) if echo else 0
        self._detokenizer = Detokenizer(texts.tokenizer, self._shown)
        self._offset = 0  # behind the text given out so far
        self._begin = 0  # of the last token

    def write(self, tokens: list[int], logprobs: list[TokenLogprobs | None]) -> CompletionLogprobs:
        """Log probabilities of the next tokens."""
        offsets = []
        for token in tokens:
            if self._to_echo == 0:  # the output begins
                self._offset += len(self._detokenizer.flush())
                self._detokenizer = Detokenizer(self._texts.tokenizer, self._shown, self._prompt)
            self._to_echo -= 1
            before, new = self._detokenizer.held_back, self._detokenizer.append(token)
            after = new + self._detokenizer.held_back
            if not before:
                self._begin = self._offset
            elif after != before and after.startswith(before):  # else the token goes on with the character that is held back
                self._begin = self._offset + len(before)
            offsets.append(self._begin)
            self._offset += len(new)
        return CompletionLogprobs(
            tokens=[self._texts.name(token) for token in tokens],
            token_logprobs=[one.chosen.logprob if one is not None else None for one in logprobs],
            top_logprobs=[self._top(one) if one is not None else None for one in logprobs],
            text_offset=offsets,
        )

    def _top(self, logprobs: TokenLogprobs) -> dict[str, float]:
        found: dict[str, float] = {}
        for one in (*logprobs.top, logprobs.chosen):  # of tokens with the same name, the likeliest stays
            found.setdefault(self._texts.name(one.token_id), one.logprob)
        return found
