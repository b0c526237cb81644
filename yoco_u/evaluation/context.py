"""Loss by context length: the last tokens of long texts, behind prefixes of different lengths.

This is the protocol of the YOCO-U paper's long-context figure. The scored tokens are the same for every prefix; only how much
text the model sees before them differs.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yoco_u.config import Config
from yoco_u.errors import UserError
from yoco_u.evaluation.finite import scored_tokens
from yoco_u.inference import LLM, SamplingParams
from yoco_u.training.metrics import perplexity


class ContextScore(Config):
    """The loss behind prefixes of one length.

    Attributes:
        prefix: number of tokens before the first target.
        loss: nats per target, the mean over all texts.
        perplexity: exp(loss).
        change: this loss minus the loss behind the shortest prefix.
        change_error: standard error of `change`, from the changes of the single texts, those of one document taken together;
            None for one document.
    """

    prefix: int
    loss: float
    perplexity: float
    change: float
    change_error: float | None


class Text(NamedTuple):
    """A piece of a document.

    Attributes:
        token_ids: as many as all texts have.
        document: number of the document, from 0.
    """

    token_ids: list[int]
    document: int


def take_texts(documents: Iterable[NDArray[np.integer]], tokens: int, limit: int | None = None) -> list[Text]:
    """Cut documents into texts of equal length, one after another. A rest at the end of a document is left out.

    Args:
        documents: token ids of each document, which begin with `<|endoftext|>`.
        tokens: length of each text.
        limit: the most texts to take; all by default.

    Raises:
        UserError: if no document is long enough, with the length of the longest.
    """
    texts: list[Text] = []
    longest = 0
    for number, document in enumerate(documents):
        longest = max(longest, len(document))
        for end in range(tokens, len(document) + 1, tokens):
            texts.append(Text(document[end - tokens : end].tolist(), number))
            if len(texts) == limit:
                return texts
    if not texts:
        raise UserError(
            f"no document is as long as the longest prefix and the targets together, {tokens} tokens; the longest has "
            f"{longest}: name longer files, or shorten the prefixes"
        )
    return texts


def text_losses(
    llm: LLM,
    texts: Sequence[Sequence[int]],
    prefixes: Sequence[int],
    last: int,
    num_loops: int | None = None,
    advance: Callable[[], None] = lambda: None,
) -> NDArray[np.float64]:
    """The mean loss in nats of the last tokens of each text behind each prefix, (texts, prefixes).

    Args:
        texts: token ids of each text, which is at least as long as the longest prefix and the targets.
        prefixes: lengths of the prefixes in tokens, at least 1.
        last: number of targets at the end of each text.
        num_loops: loop count T; the model's own by default.
        advance: called after each text.

    Raises:
        UserError: if a prefix and the targets are more than the engine holds, or a loss is not finite.
    """
    params = [
        SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=prefix, num_loops=num_loops)
        for prefix in prefixes
    ]
    losses = []
    for text in texts:
        requests = llm.generate([list(text[len(text) - last - prefix :]) for prefix in prefixes], params)
        found = [[one.logprob for one in own] for own in scored_tokens(requests, llm.engine.runner.model)]
        losses.append(-np.array(found).mean(axis=1))
        advance()
    return np.array(losses)


def context_scores(losses: NDArray[np.float64], prefixes: Sequence[int], documents: Sequence[int]) -> list[ContextScore]:
    """The scores over all texts, from the result of `text_losses`. `prefixes` must rise.

    Args:
        documents: for each text the number of its document. Pieces of one document are alike, so the standard error counts
            documents (cluster-robust): with one text each it is the usual one.
    """
    changes = losses - losses[:, :1]
    means = changes.mean(axis=0)
    _, own = np.unique(np.asarray(documents), return_inverse=True)
    count = int(own.max()) + 1
    sums = np.zeros((count, len(prefixes)))
    np.add.at(sums, own, changes - means)
    errors = np.sqrt((sums**2).sum(axis=0) * count / (count - 1)) / len(losses) if count > 1 else [None] * len(prefixes)
    return [
        ContextScore(
            prefix=prefix,
            loss=float(loss),
            perplexity=perplexity(loss),
            change=float(change),
            change_error=None if error is None else float(error),
        )
        for prefix, loss, change, error in zip(prefixes, losses.mean(axis=0), means, errors, strict=True)
    ]
