"""make_plan: merging, checking, and reporting everything that is wrong at once."""

from importlib.util import find_spec
from typing import Any

import pytest

from events.config import Config
from events.facts import Defaults
from trainers.errors import ConfigProblems, Problem
from trainers.planning.components import DPO_LOSS
from trainers.planning.plan import ComponentSpec, LoraSpec, Plan, make_plan, needing_less


def config(options: dict[str, Any] | None = None, **fields: Any) -> Config:
    return Config.model_validate({"model": "m", "data": "d", "fine_tuning_options": options or {}} | fields)


def problems_of(options: dict[str, Any] | None = None, **fields: Any) -> list[Problem]:
    with pytest.raises(ConfigProblems) as caught:
        make_plan(config(options, **fields))
    return caught.value.problems


def only_problem(extras: dict[str, Any], method: str = "lora") -> Problem:
    (problem,) = problems_of({"extras": extras, "custom_training_options": {"finetuning_type": method}})
    return problem


def test_the_default_is_lora_of_rank_8_on_one_worker() -> None:
    plan = make_plan(config())
    assert (plan.method, plan.lora, plan.lr, plan.workers, plan.max_restarts) == ("lora", LoraSpec(), 6e-4, 1, 3)
    assert not plan.enable_activation_checkpointing


def test_a_micro_batch_is_8_rows_or_4_packs_or_4_pairs() -> None:
    packed = {"extras": {"packed": True, "max_seq_len": 8}}
    chosen = [
        make_plan(config(options)).batch_size for options in ({}, packed, dpo("lora"), {"batch_size": 3} | packed)
    ]
    assert chosen == [8, 4, 4, 3]


def test_defaults_are_those_recorded_at_submit() -> None:
    before = Defaults(batch_size=4, lr=2e-5)
    plans = [
        make_plan(config(options), before) for options in ({}, {"batch_size": 2, "extras": {"lr": 1e-3}}, dpo("full"))
    ]
    assert [(plan.batch_size, plan.lr) for plan in plans] == [(4, 2e-5), (2, 1e-3), (4, 2e-5)]
    assert [plan.defaults for plan in plans] == [before, Defaults(batch_size=2, lr=1e-3), before]


def test_full_fine_tuning_has_its_own_defaults() -> None:
    plan = make_plan(config({"custom_training_options": {"finetuning_type": "full"}}))
    assert (plan.method, plan.lora, plan.lr) == ("full", None, 4e-5)
    assert plan.enable_activation_checkpointing
    assert plan.memory_efficient_fsdp_wrap
    assert plan.fsdp_cpu_offload


def test_a_plan_round_trips_through_json() -> None:
    extras = {"optimizer": {"betas": [0.8, 0.9]}, "clip_grad_norm": 1.0, "lr_scheduler": None}
    plan = make_plan(config({"extras": extras}, logger={"log_type": "wandb", "project": "p"}))
    assert Plan.model_validate_json(plan.model_dump_json()) == plan
    assert Plan.model_validate(plan.model_dump(mode="json")) == plan


def test_overrides_win_over_options_and_extras_over_both() -> None:
    options = {"batch_size": 1, "seed": 1, "n_epochs": 1, "extras": {"batch_size": 3}}
    plan = make_plan(config(options, overrides="batch_size=2 seed=2"))
    assert (plan.batch_size, plan.seed, plan.n_epochs) == (3, 2, 1)


def test_every_option_of_the_request_reaches_the_plan() -> None:
    lora = {
        "finetuning_type": "lora",
        "lora_attn_modules": ["q_proj"],
        "apply_lora_to_mlp": True,
        "apply_lora_to_output": True,
        "lora_rank": 4,
        "lora_alpha": 5,
    }
    basics = {"n_epochs": 2, "batch_size": 3, "lr": 0.5, "gradient_accumulation_steps": 6, "seed": 7, "shuffle": False}
    plan = make_plan(config(basics | {"custom_training_options": lora}, validation_data="v"))
    assert plan.lora == LoraSpec(attn_modules=("q_proj",), mlp=True, output=True, rank=4, alpha=5)
    assert basics.items() <= plan.model_dump().items()
    assert plan.validation_data == "v"


def test_nested_and_dotted_extras_mean_the_same() -> None:
    nested = {"optimizer": {"_component_": "torch.optim.SGD", "momentum": 0.9}, "model": {"lora_rank": 2}}
    dotted = {"optimizer._component_": "torch.optim.SGD", "optimizer.momentum": 0.9, "model.lora_rank": 2}
    assert make_plan(config({"extras": nested})) == make_plan(config({"extras": dotted}))


def test_torchtune_spellings_set_the_same_settings() -> None:
    extras = {
        "epochs": 5,
        "optimizer": {"lr": 0.25},
        "dataset": {"packed": True},
        "tokenizer": {"max_seq_len": 64},
        "model": {"lora_dropout": 0.5},
    }
    plan = make_plan(config({"extras": extras}))
    assert (plan.n_epochs, plan.lr, plan.packed, plan.max_seq_len) == (5, 0.25, True, 64)
    assert plan.lora is not None
    assert plan.lora.dropout == 0.5


def test_another_component_starts_without_the_arguments_of_the_one_before() -> None:
    plan = make_plan(
        config({"extras": {"optimizer": {"_component_": "torch.optim.SGD"}}}, overrides="optimizer.amsgrad=true")
    )
    assert (plan.optimizer.component, plan.optimizer.kwargs) == ("torch.optim.SGD", {})


@pytest.mark.parametrize("order", [1, -1])
def test_a_component_has_its_arguments_in_whatever_order_they_are_given(order: int) -> None:
    words = ["optimizer=torch.optim.SGD", "optimizer.momentum=0.9"][::order]
    extras = dict([("loss", DPO_LOSS), ("loss.beta", 0.5)][::order])
    plan = make_plan(config({"extras": extras}, overrides=" ".join(words)))
    assert plan.loss == ComponentSpec(component=DPO_LOSS, kwargs={"beta": 0.5})
    assert plan.optimizer == ComponentSpec(component="torch.optim.SGD", kwargs={"momentum": 0.9})


def test_no_scheduler_means_a_constant_learning_rate() -> None:
    assert make_plan(config({"extras": {"lr_scheduler": None}})).lr_scheduler is None
    assert make_plan(config(overrides="lr_scheduler=null")).lr_scheduler is None


def test_a_component_that_is_not_on_the_list_is_refused_with_the_list() -> None:
    problem = only_problem({"optimizer": {"_component_": "subprocess.check_output", "args": "id"}, "loss": {}})
    assert problem.param == "fine_tuning_options.extras.optimizer._component_"
    assert problem.code == "component_not_allowed"
    assert "torch.optim.AdamW" in problem.message


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
@pytest.mark.parametrize("kind", ["PagedAdamW8bit", "AdamW8bit", "PagedAdamW"])
def test_an_optimizer_whose_package_is_missing_is_refused_naming_it(kind: str) -> None:
    problem = only_problem({"optimizer": {"_component_": f"bitsandbytes.optim.{kind}", "lr": 1e-5}})
    assert problem.param == "fine_tuning_options.extras.optimizer._component_"
    assert problem.code == "component_not_installed"
    assert "needs the package bitsandbytes" in problem.message


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_an_optimizer_with_a_compressed_state_trains_where_nothing_is_sharded(kind: str) -> None:
    optimizer = f"optimizer=torchao.optim.{kind}"
    full = {"custom_training_options": {"finetuning_type": "full"}}
    assert make_plan(config(full, overrides=optimizer)).optimizer.component == f"torchao.optim.{kind}"
    assert make_plan(config(overrides=f"--nproc_per_node 2 {optimizer}")).workers == 2
    with pytest.raises(ConfigProblems, match="full fine-tuning with it runs on one worker"):
        make_plan(config(full, overrides=f"--nproc_per_node 2 {optimizer}"))
    with pytest.raises(ConfigProblems, match="whose state isn't sharded"):
        make_plan(config({"extras": {"fsdp_cpu_offload": True}}, overrides=f"--nproc_per_node 2 {optimizer}"))


@pytest.mark.parametrize("value", [7, None, True, ["torch.optim.SGD"], {"a": {"b": 1}}, "torch.nn.CrossEntropyLoss"])
def test_a_component_must_be_one_of_its_section(value: object) -> None:
    assert only_problem({"optimizer._component_": value}).code == "component_not_allowed"


@pytest.mark.parametrize(
    ("extras", "path", "message"),
    [
        ({"dtyp": "fp32"}, "dtyp", "did you mean dtype?"),
        ({"nope": 1}, "nope", "unknown key; docs/configuration.md lists"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr", "did you mean optimizer.lr?"),
        ({"optimizer": {"nope": 1}}, "optimizer.nope", "argument of torch.optim.AdamW, which takes betas, eps"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum", "; it is an argument of torch.optim.SGD"),
        ({"loss": {"label_smoothing": 0.1}}, "loss.label_smoothing", "; it is an argument of torch.nn.CrossEntropy"),
        ({"lr_scheduler.num_warmup_step": 1}, "lr_scheduler.num_warmup_step", "lr_scheduler.num_warmup_steps?"),
        ({"checkpointer": {"checkpoint_dir": "/"}}, "checkpointer", "the service decides where a job's files are"),
        ({"model": "other"}, "model", "it is a field of the request"),
        ({"model": {"vocab_size": 1}}, "model.vocab_size", "unknown key"),
        ({"loss": {"ignore_index": 0}}, "loss.ignore_index", "the loss mask"),
        ({"optimizer": {"eps": 0}}, "optimizer.eps", "greater than 0"),
        ({"lr": "2e-5"}, "lr", "a number goes without quotes"),
        ({"lr": 11}, "lr", "at most 10"),
        ({"lr": 10**400}, "lr", "must be a number"),
        ({"n_epochs": True}, "n_epochs", "not true"),
        ({"n_epochs": 1.5}, "n_epochs", "must be a whole number"),
        ({"compile": 1}, "compile", "must be true or false"),
        ({"dtype": "fp16"}, "dtype", "'fp32' or 'bf16'"),
        ({"packed": True}, "packed", "needs max_seq_len"),
        ({"run_val_every_n_steps": 2}, "run_val_every_n_steps", "needs validation_data"),
        ({"early_stopping_patience": 2}, "early_stopping_patience", "needs validation_data"),
        ({"keep_last_n": 0}, "keep_last_n", "a whole number from 1"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas", "a list of two numbers"),
        ({"optimizer": {"fused": True, "foreach": True}}, "optimizer.fused", "together with foreach"),
        ({"lora_attn_modules": ["w1"]}, "lora_attn_modules", "there is no 'w1'"),
        ({"lora_attn_modules": []}, "lora_attn_modules", "nothing to train"),
        ({"epochs": 1, "n_epochs": 2}, "n_epochs", "given twice"),
        ({"optimizer.eps": 1, "optimizer": {"eps": 2}}, "optimizer.eps", "given twice"),
        ({"loss": DPO_LOSS, "loss._component_": DPO_LOSS}, "loss._component_", "given twice (as loss too)"),
        ({"lr_scheduler.num_warmup_steps": 1, "lr_scheduler": None}, "lr_scheduler.num_warmup_steps", "is null beside"),
    ],
)
def test_a_bad_extra_is_named_with_its_path_and_what_to_do(extras: dict[str, Any], path: str, message: str) -> None:
    problem = only_problem(extras)
    assert problem.param == f"fine_tuning_options.extras.{path}"
    assert message in problem.message


QAT = "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer"


@pytest.mark.parametrize(
    ("extras", "kind", "method"),
    [
        ({"use_dora": True}, "lora", "dora"),
        ({"model": {"use_dora": True, "lora_rank": 4}}, "lora", "dora"),
        ({"model.quantize_base": True}, "lora", "qlora"),
        ({"use_dora": False, "quantize_base": False}, "lora", "lora"),
        ({"quantizer": {"_component_": QAT, "groupsize": 32}}, "full", "qat"),
        ({"quantizer": None}, "full", "full"),
    ],
)
def test_torchtunes_keys_choose_the_method(extras: dict[str, Any], kind: str, method: str) -> None:
    plan = make_plan(config({"extras": extras, "custom_training_options": {"finetuning_type": kind}}))
    assert (plan.method, plan.lora is not None) == (method, kind == "lora")
    assert plan.lr == (6e-4 if kind == "lora" else 4e-5)
    assert (plan.quantizer is not None) == (method == "qat")
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_a_quantizer_on_the_command_line_keeps_what_extras_do_not_set() -> None:
    full = {"custom_training_options": {"finetuning_type": "full"}, "extras": {"quantizer": {"groupsize": 64}}}
    plan = make_plan(config(full, overrides=f"quantizer={QAT}"))
    assert plan.quantizer is not None
    assert (plan.quantizer.component, plan.quantizer.kwargs) == (QAT, {"groupsize": 64})


@pytest.mark.parametrize(
    ("extras", "kind", "path", "message"),
    [
        ({"use_dora": True, "quantize_base": True}, "lora", "quantize_base", "with use_dora"),
        ({"quantizer": {"_component_": QAT}}, "lora", "quantizer._component_", "full fine-tuning only"),
        ({"quantizer": {"groupsize": 32}}, "full", "quantizer.groupsize", "needs quantizer._component_"),
        ({"quantizer": {"_component_": QAT, "precision": "x"}}, "full", "quantizer.precision", "dtype"),
        ({"quantizer": {"_component_": QAT, "groupsize": 1}}, "full", "quantizer.groupsize", "from 2 to 65536"),
        ({"quantizer": {"_component_": "torch.optim.SGD"}}, "full", "quantizer._component_", "not on the list"),
        ({"quantize_base": True, "fsdp_cpu_offload": True}, "lora", "fsdp_cpu_offload", "isn't sharded"),
        ({"quantize_base": True}, "full", "quantize_base", "only LoRA"),
        ({"use_dora": "yes"}, "lora", "use_dora", "true or false"),
        ({"fake_quant_after_n_steps": 1}, "full", "fake_quant_after_n_steps", "from the first step"),
    ],
)
def test_contradictions_are_refused_by_name(extras: dict[str, Any], kind: str, path: str, message: str) -> None:
    problem = only_problem(extras, kind)
    assert problem.param == f"fine_tuning_options.extras.{path}"
    assert message in problem.message


def test_lora_settings_are_refused_in_full_fine_tuning() -> None:
    assert "only LoRA" in only_problem({"lora_dropout": 0.1}, method="full").message


def test_nesterov_needs_momentum() -> None:
    problem = only_problem({"optimizer": {"_component_": "torch.optim.SGD", "nesterov": True}})
    assert "momentum" in problem.message


def test_a_large_value_gets_a_short_answer() -> None:
    deep: Any = "x" * 10_000
    for _ in range(50):
        deep = {"a": deep, "b": [deep]} if isinstance(deep, str) else {"a": deep}
    for key in ("dtype", "nonsense", "optimizer", "optimizer.eps"):
        assert len(only_problem({key: deep}).message) < 500


@pytest.mark.parametrize("text", ["lr=nan", "lr=inf", "lr=1e999", "optimizer.eps=nan"])
def test_a_number_on_the_command_line_must_be_finite(text: str) -> None:
    (problem,) = problems_of(overrides=text)
    assert "must be a number" in problem.message


def test_everything_wrong_is_reported_at_once() -> None:
    found = problems_of(
        {"custom_training_options": {"lora_attn_modules": ["nope"]}, "extras": {"dtyp": 1, "lr": "1"}},
        overrides="--nproc_per_node 0 --nnodes x seed=-1 dtype",
        logger={"log_type": "disk", "filename": "../x"},
    )
    assert [problem.param for problem in found] == [
        "overrides",
        "overrides",
        "overrides",
        "fine_tuning_options.custom_training_options.lora_attn_modules",
        "overrides",
        "fine_tuning_options.extras.dtyp",
        "fine_tuning_options.extras.lr",
        "logger.filename",
    ]


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", ".hidden", "-x", "a\\b", "x\n", "é", "data", "Error.txt"])
def test_a_log_file_name_must_be_a_plain_name_that_the_service_does_not_use(name: str) -> None:
    (problem,) = problems_of(logger={"log_type": "disk", "filename": name})
    assert problem.param == "logger.filename"


def test_a_wandb_project_with_a_slash_is_refused() -> None:
    (problem,) = problems_of(logger={"log_type": "wandb", "project": "team/project"})
    assert problem.param == "logger.project"


def test_rows_are_grouped_by_length_unless_their_order_is_kept_or_they_are_packed() -> None:
    assert not make_plan(config()).group_by_length
    assert make_plan(config({"extras": {"group_by_length": True}})).group_by_length
    make_plan(config({"extras": {"shuffle": False}}))
    make_plan(config({"extras": {"packed": True, "max_seq_len": 8}}))
    ordered = only_problem({"group_by_length": True, "shuffle": False})
    assert ordered.param == "fine_tuning_options.extras.group_by_length"
    assert ordered.message == "has no effect here: without shuffle the rows keep their order"
    packed = only_problem({"group_by_length": True, "packed": True, "max_seq_len": 8})
    assert packed.message == "has no effect here: packs are of one length"


def dpo(method: str, **extras: Any) -> dict[str, Any]:
    loss = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0}
    return {"custom_training_options": {"finetuning_type": method}, "extras": {"loss": loss} | extras}


@pytest.mark.parametrize(("method", "lr"), [("full", 1e-6), ("lora", 1e-5)])
def test_the_dpo_loss_makes_rows_pairs_and_has_its_own_learning_rate(method: str, lr: float) -> None:
    plan = make_plan(config(dpo(method)))
    assert (plan.pairs, plan.method, plan.lr) == (True, method, lr)
    assert plan.loss.kwargs == {"beta": 0.1, "label_smoothing": 0.0}
    assert make_plan(config(dpo(method, lr=0.5))).lr == 0.5
    assert not make_plan(config()).pairs


@pytest.mark.parametrize(
    ("extras", "path", "message"),
    [
        ({"packed": True, "max_seq_len": 8}, "packed", "can't be used with DPO"),
        ({"loss.num_output_chunks": 8}, "loss.num_output_chunks", "takes beta, label_smoothing"),
        ({"loss.beta": 0}, "loss.beta", "greater than 0"),
        ({"loss.label_smoothing": 0.6}, "loss.label_smoothing", "at most 0.5"),
        ({"ref_checkpointer": {}}, "ref_checkpointer", "the model that the job starts from"),
    ],
)
def test_what_does_not_go_with_dpo_is_refused_by_name(extras: dict[str, Any], path: str, message: str) -> None:
    loss = {"loss._component_": "torchtune.rlhf.loss.DPOLoss"}
    (problem,) = problems_of({"extras": loss | extras})
    assert problem.param == f"fine_tuning_options.extras.{path}"
    assert message in problem.message


@pytest.mark.parametrize(
    ("options", "overrides", "expected"),
    [
        ({}, "", True),
        ({"batch_size": 16, "extras": {"save_every_n_steps": 3}}, "", True),
        ({"gradient_accumulation_steps": 2}, "", False),  # the gradient is complete only with the last micro-batch
        ({"extras": {"clip_grad_norm": 1.0}}, "", False),  # its norm is that of all gradients
        ({}, "--nproc_per_node 2", False),
        ({"custom_training_options": {"finetuning_type": "lora"}}, "", False),
    ],
)
def test_weights_are_updated_within_the_backward_pass_if_nothing_else_needs_the_gradient(
    options: dict[str, Any], overrides: str, expected: bool
) -> None:
    full = {"custom_training_options": {"finetuning_type": "full"}}
    assert make_plan(config(full | options, overrides=overrides)).updates_in_backward is expected


def test_bitsandbytes_updates_all_weights_at_once() -> None:
    plan = make_plan(config({"custom_training_options": {"finetuning_type": "full"}}))
    paged = ComponentSpec(component="bitsandbytes.optim.PagedAdamW8bit")
    assert not plan.model_copy(update={"optimizer": paged}).updates_in_backward


@pytest.mark.parametrize(("optimizer", "expected"), [("torch.optim.Adam", True), ("torchao.optim.AdamW8bit", False)])
def test_more_workers_are_advised_only_where_they_are_allowed(optimizer: str, expected: bool) -> None:
    full = {"custom_training_options": {"finetuning_type": "full"}, "extras": {"optimizer": optimizer}}
    assert ("use more workers" in needing_less(make_plan(config(full)))) is expected
