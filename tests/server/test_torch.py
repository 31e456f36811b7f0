"""The core of the server's tests once more, with the same model in torch.

What the engine says is asked of the JAX backend, so the answers of the two are compared as well.
"""
# ruff: noqa: F401 (pytest runs what is imported, with the server of this file)

import pytest

from tests.server.test_answers import (
    test_a_chat_answer_is_what_the_engine_says,
    test_a_stop_string_leaks_neither_as_text_nor_as_log_probabilities,
    test_a_stream_adds_up_to_the_whole_answer,
    test_echo_scores_the_prompt_and_zero_tokens_score_it_alone,
    test_penalties_and_biases_reach_the_sampler,
    test_the_same_seed_gives_the_same_answer_and_none_gives_others,
)
from tests.server.test_clients import (
    client,
    test_closing_a_stream_of_openai_frees_the_slot,
    test_openai_chats_whole_and_streamed,
    test_openai_completes_whole_streamed_and_echoed,
    test_openai_raises_its_own_errors,
    test_openai_reads_log_probabilities_and_stops,
)
from tests.server.test_failures import (
    test_a_client_that_leaves_frees_its_slots_within_one_dispatch,
    test_a_failed_score_answers_500,
    test_a_failed_step_answers_500_and_the_next_request_is_served,
    test_a_prompt_that_cannot_be_read_takes_nobody_down_however_often,
)
from tests.server.test_refusals import (
    test_other_paths_methods_and_models_are_refused,
)
from tests.servers import make_engine, running, torch_backend


@pytest.fixture(scope="module")
def server():
    with running([make_engine(torch_backend())]) as one:
        yield one
