"""Requests that wait are generated together, each row with its own expert; for examples/serve.py."""

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from serve_metrics import Metrics
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

ROUTER = object()  # in the place of an expert's name: let the router choose


@dataclass(eq=False)
class Request:
    """A prompt on its way to be a text.

    Args:
        ids: of the prompt's tokens.
        expert: a name, None for the backbone alone, or ROUTER.
        emit: called (in the engine's thread) with each event: {"text"} as it grows, at last {"done"} or {"error"}.
    """

    ids: list[int]
    expert: Any
    max_new_tokens: int
    temperature: float
    seed: int
    emit: Callable[[dict], None]
    arrived: float = field(default_factory=time.perf_counter)
    cancelled: bool = False
    new_ids: list[int] = field(default_factory=list)
    sent: str = ""


class Engine:
    """One thread that generates, batch after batch.

    A batch is what waits when the one before is done, at most `max_batch`; the first of an idle engine waits `patience`
    seconds for others.

    Args:
        model: with experts attached.
        route: from a batch to an assignment, where requests may leave the choice; else None.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        route: Callable[[Any], Any] | None,
        *,
        max_batch: int,
        patience: float,
        max_waiting: int,
        metrics: Metrics,
    ):
        self.model, self.tokenizer, self.metrics = model, tokenizer, metrics
        self.route, self.max_batch, self.patience = route, max_batch, patience
        self.closing = False
        self._waiting: queue.Queue[Request | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="freemerge engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return self._waiting.qsize()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.closing

    def submit(self, request: Request) -> None:
        """Raises queue.Full where too many wait."""
        self._waiting.put_nowait(request)

    def close(self) -> None:
        """Finish what waits, then stop."""
        self.closing = True
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (batch := self._next_batch()) is not None:
            batch = [request for request in batch if not request.cancelled]
            try:
                if batch:
                    self.generate(batch)
            except Exception as error:  # what one batch meets must not end the service
                for request in batch:
                    request.emit({"error": f"{type(error).__name__}: {error}"})

    def _next_batch(self) -> list[Request] | None:
        first = self._waiting.get()
        if first is None:
            return None
        batch, until = [first], time.perf_counter() + self.patience
        while len(batch) < self.max_batch:
            try:
                request = self._waiting.get(timeout=max(0.0, until - time.perf_counter()))
            except queue.Empty:
                break
            if request is None:  # closing: this batch is the last
                self._waiting.put(None)
                break
            batch.append(request)
        return batch

    def generate(self, batch: Sequence[Request]) -> None:
        """Generate for all, each with its expert; events go out as tokens come."""
        self.metrics.batch.observe(len(batch))
        inputs = self._padded([request.ids for request in batch], left=True)
        weights = self._weights(batch)
        config = GenerationConfig(
            max_new_tokens=max(request.max_new_tokens for request in batch),
            do_sample=False,  # sampling is _Sampled's, whose draws depend on a request's seed alone
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self._pad,
        )
        listener = _Listener(self, batch, [_shown(self.model.experts, row) for row in weights])
        with self.model.routed(weights), torch.inference_mode():
            self.model.generate(
                **inputs,
                generation_config=config,
                logits_processor=LogitsProcessorList([_Sampled(batch)]),
                stopping_criteria=StoppingCriteriaList([_Ended(batch, inputs["input_ids"].shape[1])]),
                streamer=listener,
            )

    def _weights(self, batch: Sequence[Request]) -> np.ndarray:
        """[rows, experts]"""
        names = self.model.experts
        weights = np.zeros((len(batch), len(names)), np.float32)
        routed = [row for row, request in enumerate(batch) if request.expert is ROUTER]
        for row, request in enumerate(batch):
            if isinstance(request.expert, str):
                weights[row, names.index(request.expert)] = 1
        if routed:
            found = self.route(self._padded([batch[row].ids for row in routed], left=False))
            for row, picked in zip(routed, found, strict=True):
                if isinstance(picked, str):
                    weights[row, names.index(picked)] = 1
                elif picked is not None:
                    weights[row] = picked
        return weights

    @property
    def _pad(self) -> int:
        token = self.tokenizer.pad_token_id
        return token if token is not None else (self.tokenizer.eos_token_id or 0)

    def _padded(self, prompts: Sequence[list[int]], *, left: bool) -> dict[str, torch.Tensor]:
        longest = max(map(len, prompts))
        ids = torch.full((len(prompts), longest), self._pad)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            place = slice(longest - len(prompt), None) if left else slice(len(prompt))
            ids[row, place], mask[row, place] = torch.tensor(prompt), 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}


def _shown(names: Sequence[str], weights: np.ndarray) -> Any:
    """A row of weights as an answer names it: one expert, None, or a mapping."""
    used = {name: float(weight) for name, weight in zip(names, weights, strict=True) if weight}
    if not used:
        return None
    return next(iter(used)) if list(used.values()) == [1.0] else used


class _Listener:
    """What `generate` calls with each step's tokens, the prompt first; a transformers streamer for several rows."""

    def __init__(self, engine: Engine, batch: Sequence[Request], experts: Sequence[Any]):
        self._tokenizer, self._metrics = engine.tokenizer, engine.metrics
        self._batch, self._experts, self._prompt_seen = batch, experts, False
        stops = engine.model.generation_config.eos_token_id
        self._stops = set(stops) if isinstance(stops, list) else {stops}
        self.ended = [False] * len(batch)  # rows, which get padding from then on

    def put(self, tokens: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        for row, token in enumerate(tokens.tolist()):
            if not self.ended[row]:
                self._take(row, token)

    def end(self) -> None:
        """Of the batch; rows that have not ended by themselves lost their clients."""
        for row, ended in enumerate(self.ended):
            if not ended:
                self._finish(row, "cancelled")

    def _take(self, row: int, token: int) -> None:
        request = self._batch[row]
        if not request.new_ids:
            self._metrics.first.observe(time.perf_counter() - request.arrived)
        request.new_ids.append(token)
        stopped = token in self._stops
        text = self._tokenizer.decode(request.new_ids, skip_special_tokens=True)
        last = stopped or request.cancelled or len(request.new_ids) >= request.max_new_tokens
        # a character whose bytes have not all come is held back; so is a text that a later token changes
        if text.startswith(request.sent) and (last or not text.endswith("\ufffd")) and text != request.sent:
            request.emit({"text": text[len(request.sent) :]})
            request.sent = text
        if last:
            self._finish(row, "cancelled" if request.cancelled else "stop" if stopped else "length")

    def _finish(self, row: int, reason: str) -> None:
        self.ended[row] = True
        request, expert, metrics = self._batch[row], self._experts[row], self._metrics
        label = expert if isinstance(expert, str) else "several" if expert else "none"
        metrics.rows.add(label)
        metrics.prompt_tokens.add(amount=len(request.ids))
        metrics.new_tokens.add(amount=len(request.new_ids))
        metrics.whole.observe(time.perf_counter() - request.arrived)
        counts = {"prompt_tokens": len(request.ids), "new_tokens": len(request.new_ids)}
        request.emit({"done": True, "expert": expert, "finish_reason": reason, **counts})


class _Ended(StoppingCriteria):
    """Rows whose own limit is reached, or whose client has gone; `generate` itself knows of the end token alone."""

    def __init__(self, batch: Sequence[Request], prompt_length: int):
        self._batch, self._prompt_length = batch, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        count = input_ids.shape[1] - self._prompt_length
        ended = [request.cancelled or count >= request.max_new_tokens for request in self._batch]
        return torch.tensor(ended, device=input_ids.device)


class _Sampled(LogitsProcessor):
    """Rows with a temperature: Gumbel noise of the request's own generator, so that the largest logit is a draw.

    argmax( logits / temperature + Gumbel ) has the distribution softmax( logits / temperature ).
    """

    def __init__(self, batch: Sequence[Request]):
        self._rows = [(row, r.temperature, r.seed) for row, r in enumerate(batch) if r.temperature > 0]
        self._generators = [torch.Generator().manual_seed(seed) for _, _, seed in self._rows]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not self._rows:
            return scores
        scores = scores.float().clone()
        for (row, temperature, _), generator in zip(self._rows, self._generators, strict=True):
            noise = torch.rand(scores.shape[1], generator=generator, dtype=torch.float64).log().neg().log().neg()
            scores[row] = scores[row] / temperature + noise.float().to(scores.device)
        return scores


def emitter(loop: asyncio.AbstractEventLoop, events: asyncio.Queue) -> Callable[[dict], None]:
    """Events from the engine's thread into an event loop's queue; dropped once the loop has closed."""

    def emit(event: dict) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            return

    return emit
