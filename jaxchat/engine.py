"""Generation for many requests at once, on any backend.

Requests of different lengths share the rows ("slots") of one KV cache. The one idea: a slot is the
list of ids that its row holds and the list of ids that are still to be read. What is pending
decides what happens next: several ids (a prompt, the output of a tool) are prefilled, one id is
decoded along with all other slots, up to `tokens_per_dispatch` tokens before the host looks again.
So a new request joins between two dispatches, a prompt that begins with what any slot holds is read
from there on, and the samples of one prompt share one prefill.

Left out: threads, queues with limits and time-outs (the server), text of prompts (conversation.py).
"""

import math
from collections import deque
from collections.abc import Generator, Iterable, Sequence

import numpy as np

from jaxchat import sampling
from jaxchat.backend import Backend, PromptScores
from jaxchat.dispatch import alternatives, make_batch
from jaxchat.progress import OnProgress, unheard
from jaxchat.reply import Reply
from jaxchat.request import Alternatives, Completion, Event, Request
from jaxchat.sampling_params import SamplingParams
from jaxchat.slots import WORTH_COPYING, Prompt, Sample, Slot, common_prefix
from jaxchat.tokenizer import Tokenizer

SLOTS = 8
"""Rows of the cache, unless told otherwise."""

PREFILL_TOKENS = 512
"""Tokens of prompts that a server reads between two dispatches of replies under way."""

TOKENS_PER_DISPATCH = 16
"""Tokens per row between two looks of the host: at d6 on a CPU, 60-130 ms."""


class Engine:
    """Drives a backend; not thread-safe: one thread submits, steps and cancels."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: Tokenizer,
        *,
        slots: int = SLOTS,
        max_length: int | None = None,
        tokens_per_dispatch: int = TOKENS_PER_DISPATCH,
        prefill_tokens: int | None = None,
        batch_invariant: bool = False,
    ) -> None:
        """`max_length`: tokens a prompt and its reply may have; the model's context when None.

        `prefill_tokens`: of prompts, after which replies under way get their next dispatch. None
        reads all prompts first: the whole is done earliest, but replies pause meanwhile.

        `batch_invariant`: a reply is the same whatever else the engine does or has done, in half
        precision too (on torch in float32 the tokens are, not the last bits of log-probabilities).
        Costs time: every step looks at whole rows, no prompt of another request is reused, and a
        slot whose reply has ended waits for its dispatch to end.
        """
        context = backend.config.sequence_len
        self.max_length = context if max_length is None else max_length
        self.prefill_tokens = math.inf if prefill_tokens is None else prefill_tokens
        least = min(slots, tokens_per_dispatch, self.prefill_tokens)
        if least < 1 or not 1 <= self.max_length <= context:
            raise ValueError(
                f"slots={slots}, tokens_per_dispatch={tokens_per_dispatch} and prefill_tokens="
                f"{prefill_tokens} must be at least 1, max_length={self.max_length} between 1 and "
                f"the model's context of {context}"
            )
        self.backend, self.tokenizer, self.slots = backend, tokenizer, slots
        self.tokens_per_dispatch, self.batch_invariant = tokens_per_dispatch, batch_invariant
        self._eos = frozenset(map(tokenizer.special_id, ("assistant_end", "bos")))
        self._python_end = tokenizer.special_id("python_end")
        self._cache = backend.new_cache(slots, self.max_length)
        self._slots = [Slot(index) for index in range(slots)]
        self._waiting: deque[Sample] = deque()
        self._at_work: Sequence[Slot] = ()
        """The slots that a step works for just now: one that it reads or decodes, or all."""
        self._decoding = False
        """Whether it decodes them."""
        self._prefilled = 0
        """Tokens of prompts read since the last dispatch."""
        self._suspects: list[Slot] = []
        """Slots of which one made a step fail that decoded all: each is decoded alone once."""
        self._events: list[Event] = []
        self._count = 0
        self.prompt_tokens, self.reused_tokens = 0, 0
        """Of all prompts so far, and how many of them the cache still held."""

    # --- requests ------------------------------------------------------------------------------

    def submit(self, request: Request) -> int:
        """Queue a request and return its number.

        ValueError for a prompt that is empty, longer than `max_length`, or not of this vocabulary.
        """
        self.check(request)
        number, self._count = self._count, self._count + 1
        prompt = Prompt(list(request.ids))
        for row in range(request.row, request.row + request.n):
            stops = request.params.stop
            reply = Reply(self.tokenizer, stops=stops, tools=request.tools)
            self._waiting.append(Sample(number, row, request, prompt, reply))
        return number

    def cancel(self, number: int) -> None:
        """End a request wherever it stands; nothing happens when it has ended already."""
        self._end(number, "cancelled")

    def _end(self, number: int, reason: str) -> None:
        for sample in [sample for sample in self._waiting if sample.number == number]:
            self._waiting.remove(sample)
            self._finish(sample, reason)
        for slot in self._slots:
            if slot.sample is not None and slot.sample.number == number:
                self._finish(slot.sample, reason)
                slot.sample = None

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._events or self._waiting or any(slot.sample for slot in self._slots))

    def step(self) -> list[Event]:
        """Read one prompt, or else decode once; returns what came of it.

        A first token is returned as soon as its prompt has been read: nobody waits for other
        prompts or a dispatch to see the beginning of a reply.
        """
        self._at_work, self._decoding = self._slots, False
        self._admit()
        slot = self._next_to_read()
        if slot is not None:
            self._at_work = (slot,)
            self._prefill(slot)
        else:
            self._at_work, self._decoding = self._next_to_decode(), True
            self._decode()
            self._prefilled = 0
        events, self._events = self._events, []
        return events

    def warm_up(self) -> None:
        """Compile everything that any request may need; nothing may be under way."""
        if self.busy:
            raise ValueError("this engine is busy: warm it up before the first request")
        self._cache = self.backend.warm_up(self._cache, self.tokens_per_dispatch)
        self._forget_rows()

    def reset(self) -> list[Event]:
        """Start over after a step has failed: returns the ends of what it took down.

        A failure while one slot was read or decoded is its request's, which ends with the reason
        `error`. The others go on, their rows read anew: a failed step may have left nothing of the
        cache. After a failure of several that were decoded, each goes on alone for a dispatch, so
        that only the one at fault ends. What waits still waits.
        """
        samples = [slot.sample for slot in self._at_work if slot.sample is not None]
        if self._decoding and len(samples) > 1:
            self._suspects = list(self._at_work)
        else:
            for number in dict.fromkeys(sample.number for sample in samples):
                self._end(number, "error")
        for slot in self._slots:
            slot.pending = [] if slot.sample is None else slot.held + slot.pending
            slot.held = []
        self._cache = None  # before its successor: there may be no room for both
        self._cache = self.backend.new_cache(len(self._slots), self.max_length)
        events, self._events = self._events, []
        return events

    def probe(self) -> None:
        """Read and write on a cache that is fresh from `reset`; raises what the backend raises."""
        slots, waiting, suspects = self._slots, self._waiting, self._suspects
        self._slots, self._waiting = [Slot(slot.index) for slot in slots], deque()
        self._suspects = []
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        try:
            self.complete([Request([self.tokenizer.bos_id], params, tools=False)])
        finally:
            self._slots, self._waiting, self._suspects = slots, waiting, suspects
            self._events.clear()

    def score_prompt(self, ids: Sequence[int]) -> PromptScores:
        """Log-probabilities of every token of a text and their alternatives."""
        self.check(Request(ids))
        return self.backend.score_prompt(np.array(ids, np.int32))

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """The events of one request as they come; closing the iterator cancels it.

        Drives the engine itself, so nothing else may be under way.
        """
        number = self._submit_alone([request])[0]
        try:
            while self.busy:
                yield from self.step()
        finally:
            self.cancel(number)
            self._events.clear()

    def complete(
        self, requests: Iterable[Request], on_progress: OnProgress = unheard
    ) -> list[Completion]:
        """Every reply to any number of requests, in their order, samples of one request in a row.

        Drives the engine itself, so nothing else may be under way. `on_progress` hears the share of
        replies that are whole.
        """
        requests = list(requests)
        numbers = self._submit_alone(requests)
        completions = {
            (number, row): Completion(number, row)
            for number, request in zip(numbers, requests, strict=True)
            for row in range(request.row, request.row + request.n)
        }
        whole = 0
        while self.busy:
            for event in self.step():
                completions[event.request, event.row].add(event)
                whole += event.finish_reason is not None
            on_progress(whole / len(completions))
        return list(completions.values())

    def _submit_alone(self, requests: Sequence[Request]) -> list[int]:
        if self.busy:
            raise ValueError("this engine is busy with other requests: use submit and step")
        for request in requests:
            self.check(request)
        return [self.submit(request) for request in requests]

    def check(self, request: Request) -> None:
        """ValueError for a request that `submit` would refuse; may be called from any thread."""
        length, vocab = len(request.ids), self.backend.config.vocab_size
        if not 1 <= length <= self.max_length:
            raise ValueError(
                f"the prompt has {length} tokens, this engine reads 1 to {self.max_length}: "
                "shorten the prompt or use a model with a longer context"
            )
        if not all(0 <= id < vocab for id in request.ids):
            raise ValueError(f"the prompt has ids outside of the vocabulary of {vocab}")
        if request.n < 1 or request.row < 0:
            raise ValueError(f"n={request.n} must be at least 1 and row={request.row} at least 0")
        if beyond := [token for token, _ in request.params.logit_bias if token >= vocab]:
            raise ValueError(f"logit_bias names token {beyond[0]}, the vocabulary ends at {vocab}")

    def _forget_rows(self) -> None:
        for slot in self._slots:
            slot.held, slot.pending = [], []

    # --- scheduling ----------------------------------------------------------------------------

    def _admit(self) -> None:
        """Waiting samples into free slots.

        A conversation goes on in the row that holds it. Another one, however it begins, takes the
        row that was used longest ago.
        """
        free = [slot for slot in self._slots if slot.sample is None]
        if self.batch_invariant:
            for slot in free:
                slot.held = []  # what another request has left was rounded in other places
        while self._waiting and free:
            sample = self._waiting.popleft()
            slot = max(free, key=lambda s: (s.worth(sample.prompt.ids), -s.used))
            free.remove(slot)
            self._count_use(slot)
            slot.start(sample)
            self.prompt_tokens += len(sample.prompt.ids)

    def _count_use(self, slot: Slot) -> None:
        slot.used = max(other.used for other in self._slots) + 1

    def _prefill(self, slot: Slot) -> None:
        """Read what is pending and sample the next token on the host."""
        sample = slot.sample
        assert sample is not None
        logits = self._read(slot) if slot.started else self._read_prompt(slot, sample.prompt)
        slot.started = True
        _check_finite(logits)
        params = sample.request.params
        uniform = sampling.uniform(params.seed, sample.row, sample.length)
        length = len(sample.prompt.ids)
        history = sampling.History(sample.prompt.ids, slot.held[length:])
        token = sampling.sample(logits, params, uniform, history)
        top = sampling.alternatives(logits, params.top_logprobs)
        self._accept(slot, token, sampling.logprob(logits, token), top)

    def _read(self, slot: Slot) -> np.ndarray:
        ids = np.array(slot.pending, np.int32)
        self._cache, logits = self.backend.prefill(self._cache, slot.index, ids, len(slot.held))
        self._prefilled += len(ids)
        slot.held += slot.pending
        return logits

    def _read_prompt(self, slot: Slot, prompt: Prompt) -> np.ndarray:
        """The logits after a prompt, of which no more is read than no row holds."""
        length = len(prompt.ids)
        known = length if prompt.logits is not None else length - 1  # the last is read for these
        source, shared = self._longest_prefix(slot, prompt)
        shared = min(shared, known)
        leaves_nothing = shared == length
        if source is not slot and (leaves_nothing or shared >= len(slot.held) + WORTH_COPYING):
            self._cache = self.backend.copy_row(self._cache, source.index, slot.index, shared)
            slot.held, slot.pending = prompt.ids[:shared], prompt.ids[shared:]
        self.reused_tokens += len(slot.held)
        if prompt.logits is None or slot.pending:
            prompt.logits = self._read(slot)
        return prompt.logits

    def _longest_prefix(self, slot: Slot, prompt: Prompt) -> tuple[Slot, int]:
        """The slot with most of a prompt's beginning, the given one where none has more."""
        others = self._slots
        if self.batch_invariant:  # what another request reads is rounded in other places
            others = [s for s in others if s.sample is not None and s.sample.prompt is prompt]
        longest, shared = slot, common_prefix(slot.held, prompt.ids)
        for other in others:
            if other.held[shared : shared + 1] == prompt.ids[shared : shared + 1]:  # or no more
                found = common_prefix(other.held, prompt.ids)
                if found > shared:
                    longest, shared = other, found
        return longest, shared

    def _next_to_read(self) -> Slot | None:
        """The slot that has waited longest to be read; None where it is the others' turn."""
        unread = [slot for slot in self._slots if slot.unread]
        others_turn = self._prefilled >= self.prefill_tokens and not self._suspects
        if others_turn and any(slot.ready for slot in self._slots):
            return None
        return min(unread, key=lambda slot: slot.used, default=None)

    def _next_to_decode(self) -> Sequence[Slot]:
        """All that are ready, or one that is suspected of having made them fail."""
        while self._suspects:
            slot = self._suspects.pop(0)
            if slot.ready:
                return (slot,)
        return [slot for slot in self._slots if slot.ready]

    def _decode(self) -> None:
        budgets = [
            (slot, min(self.tokens_per_dispatch, self._room(slot.sample)))
            for slot in self._at_work
            if slot.sample is not None
        ]
        if not budgets:
            return
        batch = make_batch(
            len(self._slots),
            budgets,
            steps=self.tokens_per_dispatch,
            stop_ids=self._eos | {self._python_end},
            invariant=self.batch_invariant,
        )
        result = self.backend.decode(self._cache, batch)
        self._cache = result.cache
        for slot, _ in budgets:
            sample = slot.sample
            assert sample is not None
            count = int(result.counts[slot.index])
            tokens = result.tokens[slot.index, :count].tolist()
            logprobs = result.logprobs[slot.index, :count].tolist()
            _check_finite(logprobs)
            tops = alternatives(result, slot.index, count, sample.request.params.top_logprobs)
            for token, logprob, top in zip(tokens, logprobs, tops, strict=True):
                slot.held += slot.pending
                self._accept(slot, token, logprob, top)
                if slot.sample is None:
                    break

    # --- what a token means --------------------------------------------------------------------

    def _accept(self, slot: Slot, token: int, logprob: float, top: Alternatives) -> None:
        """Take in a sampled token: it ends the reply, or waits, with what a tool adds to it."""
        sample = slot.sample
        assert sample is not None
        slot.pending = [token]
        if token in self._eos and not sample.request.params.ignore_eos:
            self._finish(sample, "stop", stop_id=token, logprob=logprob, top=top)
            slot.sample = None
            return
        self._emit(sample, token, logprob, top)
        for forced in sample.reply.forced_after(token)[: self._room(sample)]:
            slot.pending.append(forced)
            self._emit(sample, forced, None)
        if sample.reply.stopped or not self._room(sample):
            self._finish(sample, "length")  # unless a stop string ended it
            slot.sample = None

    def _room(self, sample: Sample) -> int:
        """Tokens that the reply may still get. The very last one is never read, so needs no row."""
        return min(
            sample.request.params.max_tokens - sample.generated,
            self.max_length + 1 - sample.length,
        )

    def _emit(
        self, sample: Sample, token: int, logprob: float | None, top: Alternatives = ()
    ) -> None:
        part, text = sample.reply.push(token)
        sample.generated += 1
        forced = logprob is None
        self._events.append(
            Event(sample.number, sample.row, part, text, token, logprob, forced=forced, top=top)
        )

    def _finish(
        self,
        sample: Sample,
        reason: str,
        *,
        stop_id: int | None = None,
        logprob: float | None = None,
        top: Alternatives = (),
    ) -> None:
        text, part = sample.reply.flush(), sample.reply.part
        self._events.append(
            Event(
                sample.number,
                sample.row,
                part,
                text,
                logprob=logprob,
                finish_reason="stop" if sample.reply.stopped else reason,
                stop_id=stop_id,
                top=top,
            )
        )


def _check_finite(scores: np.ndarray | Sequence[float]) -> None:
    """ValueError for what no token can be chosen by; it would spoil whoever uses the row next."""
    if not np.isfinite(scores).all():
        raise ValueError(
            "the model's logits are not finite: its weights are damaged, or too large for its "
            "dtype (JAXCHAT_DTYPE=float32 has room)"
        )
