"""Hypothesis strategies for events: everything the models allow, likely or not."""

from hypothesis import strategies as st

from events.facts import (
    CancelRequested,
    CheckpointSaved,
    CheckpointsDeleted,
    DataRejected,
    DataReport,
    DataValidated,
    Defaults,
    Event,
    JobAdmitted,
    JobCancelled,
    JobError,
    JobFailed,
    JobPaused,
    JobResumed,
    JobSubmitted,
    JobSucceeded,
    LineError,
    MetricsRecorded,
    Origin,
    PauseRequested,
    Resources,
    RunInterrupted,
    RunStarted,
    StepMetrics,
)

text = st.text(max_size=8)
counts = st.integers(0, 2**63)
attempts = st.integers(1, 3)
numbers = st.floats()  # NaN and the infinities too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
configs = st.dictionaries(st.sampled_from(["model", "metadata", "fine_tuning_options"]) | text, json_values, max_size=4)
any_character = st.text(st.characters(exclude_categories=()), max_size=8)  # halves of surrogate pairs too

errors = st.builds(
    JobError,
    code=text,
    message=any_character,
    param=st.none() | text,
    fault=st.sampled_from(["user", "capacity", "infrastructure"]),
    rank=st.none() | st.integers(0, 8),
    line=st.none() | st.integers(1),
    suggestion=st.none() | any_character,
    retryable=st.none() | st.booleans(),
)
reports = st.builds(
    DataReport,
    **dict.fromkeys(
        (
            *("rows", "invalid_rows", "tokens", "trained_tokens", "truncated_rows"),
            *("partly_shown_rows", "unprompted_rows", "max_seq_len"),
        ),
        counts,
    ),
    uri=text,
    length_histogram=st.dictionaries(text, counts, max_size=2),
    errors=st.lists(st.builds(LineError, line=st.integers(1), message=any_character), max_size=2),
)
resources = st.builds(
    Resources,
    workers=st.integers(1, 8),
    nodes=st.integers(1, 8),
    cpus_per_worker=st.floats(0.1, 64),
    gpus_per_worker=st.floats(0, 8),
)
steps = st.builds(
    StepMetrics,
    step=st.integers(0, 100),
    epoch=st.integers(0, 5),
    time=text,
    loss=st.none() | numbers,
    valid_loss=st.none() | numbers,
    tokens=st.none() | counts,
)
maybe = st.none() | reports

events: st.SearchStrategy[Event] = st.one_of(
    st.builds(
        JobSubmitted,
        config=configs,
        resources=resources,
        max_restarts=st.integers(0, 3),
        submission_id=text,
        idempotency_key=st.none() | text,
        request_digest=st.none() | text,
        defaults=st.none() | st.builds(Defaults, batch_size=st.integers(1, 64), lr=numbers),
        resubmitted_from=st.none()
        | st.builds(Origin, job_id=text, checkpoint=text, base_model=st.none() | text, suffix=st.none() | text),
    ),
    st.builds(DataValidated, data=reports, validation_data=maybe),
    st.builds(DataRejected, error=errors, error_path=text, data=maybe, validation_data=maybe),
    st.builds(JobAdmitted),
    st.builds(
        RunStarted,
        attempt=attempts,
        **dict.fromkeys(("workers", "nodes", "total_steps"), counts),
        n_epochs=st.none() | counts,
        device=text,
        logs=text,
    ),
    st.builds(MetricsRecorded, attempt=attempts, steps=st.lists(steps, min_size=1, max_size=3)),
    st.builds(
        CheckpointSaved,
        attempt=attempts,
        step=st.integers(0, 100),
        epoch=st.integers(0, 5),
        uri=st.sampled_from(["a", "b", "c"]),
        metrics=st.dictionaries(text, numbers, max_size=2),
        best=st.booleans(),
    ),
    st.builds(CheckpointsDeleted, attempt=attempts, uris=st.lists(st.sampled_from(["a", "b", "c"]), min_size=1)),
    st.builds(RunInterrupted, attempt=st.integers(0, 3), reason=any_character),
    st.builds(PauseRequested, by=st.sampled_from(["user", "shutdown", "node_drain"])),
    st.builds(JobPaused, attempt=st.integers(0, 3)),
    st.builds(JobResumed),
    st.builds(CancelRequested),
    st.builds(JobSucceeded, attempt=st.none() | attempts),
    st.builds(JobFailed, attempt=st.none() | attempts, error=errors, error_path=st.none() | text),
    st.builds(JobCancelled),
)
