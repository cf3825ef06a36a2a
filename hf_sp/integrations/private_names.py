"""Every name of transformers and accelerate that the integrations replace or rely on.

Data only; what is merely imported needs no entry. tests/integrations/test_names.py looks each up in
the installed versions and compares signatures and the lines of source that the patches were written
against: a release that changes one fails there, by name, and not in somebody's training run.
"""

from __future__ import annotations

from hf_sp.patching import Name

_TRAINER = "transformers.trainer:Trainer."
_ARGUMENTS = "transformers.training_args:TrainingArguments."
_ACCELERATOR = "accelerate.accelerator:Accelerator."
_OPERATIONS = "accelerate.utils.operations:"
_CONFIG = "accelerate.parallelism_config:ParallelismConfig."
_DTENSOR = "torch.distributed.tensor:DTensor."
_DISPATCHER = "accelerate.data_loader:DataLoaderDispatcher."

NAMES: tuple[Name, ...] = (
    # transformers: where a layer's checkpoint function is
    Name(
        "transformers.modeling_utils:PreTrainedModel._set_gradient_checkpointing",
        None,
        ('setattr(module, "_gradient_checkpointing_func", gradient_checkpointing_func)',),
    ),
    Name(
        "transformers.modeling_layers:GradientCheckpointingLayer",
        None,
        ("return self._gradient_checkpointing_func(partial(",),
    ),
    # transformers: replaced methods
    Name(_TRAINER + "create_accelerator_and_postprocess", "(self)", ("self.accelerator = Acc",)),
    Name(_TRAINER + "_validate_args", "(self)"),
    Name(_TRAINER + "call_model_init", "(self, trial=None)"),
    Name(_TRAINER + "get_batch_samples", "(self, epoch_iterator, num_batches, device)"),
    Name(
        _TRAINER + "_get_train_sampler",
        "(self, train_dataset=None)",
        ("self.args.train_batch_size * self.args.gradient_accumulation_steps,",),
    ),
    Name(
        _TRAINER + "_move_model_to_device",
        "(self, model, device)",
        ("model = model.to(device)",),
    ),
    Name(_TRAINER + "store_flos", "(self)", ("distributed_broadcast_scalars([self.current_flos]",)),
    Name(
        _TRAINER + "prediction_step",
        "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
        ("if prediction_loss_only:\n            return (loss, None, None)",),
    ),
    Name(
        _TRAINER + "evaluation_loop",
        "(self, dataloader, description, prediction_loss_only=None, ignore_keys=None, "
        "metric_key_prefix='eval')",
        ("self.gather_function = self.accelerator.gather_for_metrics",),
    ),
    Name(_TRAINER + "log", "(self, logs, start_time=None)"),
    Name(
        _TRAINER + "save_model",
        "(self, output_dir=None, _internal_call=False)",
        ('self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)',),
    ),
    Name(
        _TRAINER + "_save",
        "(self, output_dir=None, state_dict=None)",
        ("self.model.save_pretrained(output_dir, state_dict=state_dict",),
    ),
    Name(
        _TRAINER + "_save_checkpoint",
        "(self, model, trial)",
        (
            "self.save_model(output_dir, _internal_call=True)",
            "self._save_optimizer_and_scheduler(output_dir)",
            "self._get_output_dir(trial=trial)",
            "self._push_from_checkpoint(output_dir)",
        ),
    ),
    Name(_TRAINER + "_get_output_dir", "(self, trial)"),
    Name(_TRAINER + "_push_from_checkpoint", "(self, checkpoint_folder)"),
    Name(_TRAINER + "train", None, ("get_last_checkpoint(args.output_dir)",)),
    Name(
        _TRAINER + "_save_optimizer_and_scheduler",
        "(self, output_dir)",
        ("elif self.args.should_save:",),
    ),
    Name(_TRAINER + "_save_rng_state", "(self, output_dir)", ("self.args.process_index",)),
    Name(_TRAINER + "is_world_process_zero", "(self)", ("self.args.process_index == 0",)),
    Name(_ARGUMENTS + "should_save", "(self)", ("self.process_index == 0",)),
    Name(_ARGUMENTS + "should_log", "(self)", ("self.process_index == 0",)),
    Name(
        _ARGUMENTS + "main_process_first",
        "(self, local=True, desc='work')",
        ("self.world_size > 1",),
    ),
    Name(_TRAINER + "_load_optimizer_and_scheduler", "(self, checkpoint)"),
    Name(
        _TRAINER + "_load_rng_state",
        "(self, checkpoint)",
        ('f"rng_state_{process_index}.pth"', '"rng_state.pth"'),
    ),
    Name(
        _TRAINER + "_issue_warnings_after_load",
        "(self, load_result)",
        ("load_result.missing_keys",),
    ),
    Name(
        "transformers.modeling_utils:PreTrainedModel.save_pretrained",
        None,
        (
            "if state_dict is None:",
            "self.gather_sharded_state_dict_for_save(",
            "self.should_save_on_this_rank(is_main_process)",
            "self.barrier_after_gathered_checkpoint_save(distributed_config)",
            "tensor = state_dict.pop(tensor_name)",
            "safe_save_file(shard_state_dict, filename, metadata=metadata)",
        ),
    ),
    Name("transformers.modeling_utils:safe_save_file"),
    Name(
        "transformers.modeling_utils:PreTrainedModel.gather_sharded_state_dict_for_save",
        "(self, model_to_save, state_dict, distributed_config, *, save_on_this_rank=True)",
    ),
    Name(
        "transformers.modeling_utils:PreTrainedModel.barrier_after_gathered_checkpoint_save",
        "(self, distributed_config)",
    ),
    Name(
        "transformers.modeling_utils:remove_tied_weights_from_state_dict",
        None,
        ("model.get_parameter_or_buffer(name)",),
    ),
    Name(
        "transformers.modeling_utils:PreTrainedModel.resize_token_embeddings",
        "(self, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True)",
    ),
    Name(
        "transformers.trainer_callback:CallbackHandler.call_event",
        "(self, event, args, state, control, **kwargs)",
        ("control = result",),
    ),
    Name("transformers.generation.utils:GenerationMixin.generate"),
    Name(
        "transformers.modeling_utils:convert_and_load_state_dict_in_model",
        "(model, state_dict, load_config, disk_offload_index=None)",
        ("DtensorShardOperation(empty_param)", "get_device(device_map, renamed_key"),
    ),
    Name(
        "transformers.core_model_loading:WeightConverter.convert",
        None,
        ("collected_tensors = self.materialize_tensors()", "return collected_tensors"),
    ),
    Name(
        "transformers.distributed.sharding_utils:DtensorShardOperation._compute_strided_slice",
        "(self, intervals, rank, world_size, split_factor)",
        ("group_width = math.ceil((interval_end - interval_start) / split_factor)",),
    ),
    # transformers: used
    Name(
        "transformers.modeling_utils:PreTrainedModel._load_pretrained_model",
        None,
        ("= file_pointer.get_slice(k)", "loading_info, disk_offload_index = convert_and_load_st"),
    ),
    Name(
        "transformers.modeling_utils:PreTrainedModel._move_missing_keys_from_meta_to_device",
        "(self, missing_keys, device_map, device_mesh, hf_quantizer)",
        ("missing_keys - self.all_tied_weights_keys", "get_device(device_map, key, valid_torch_"),
    ),
    Name(_TRAINER + "_maybe_log_save_evaluate", None, ("self.log(logs, start_time)",)),
    Name(
        _TRAINER + "_load_from_checkpoint",
        "(self, resume_from_checkpoint, model=None)",
        ("model.load_state_dict(state_dict, False)", "self._issue_warnings_after_load"),
    ),
    Name(_TRAINER + "_build_accelerator_args", None, ('"] = self.args.parallelism_config',)),
    Name(
        "transformers.trainer:load_sharded_checkpoint",
        "(model, folder, strict=True, prefer_safe=True)",
        ("model.load_state_dict(state_dict, strict=False)",),
    ),
    Name(_TRAINER + "_load_best_model", "(self)", ("model.load_state_dict(state_dict, False)",)),
    # accelerate: replaced methods
    Name(_CONFIG + "_validate_accelerator", "(self, accelerator)", ("accelerator.multi_device",)),
    Name(_ACCELERATOR + "prepare", "(self, *args, device_placement=None)"),
    Name(
        _ACCELERATOR + "prepare_model",
        "(self, model, device_placement=None, evaluation_mode=False)",
    ),
    Name(
        _ACCELERATOR + "prepare_data_loader",
        "(self, data_loader, device_placement=None, slice_fn_for_dispatch=None)",
        ("num_processes=self.num_processes", "process_index=self.process_index"),
    ),
    Name(_ACCELERATOR + "reduce", "(self, tensor, reduction='sum', scale=1.0)"),
    Name("accelerate.utils.operations:_gpu_gather", "(tensor)", ("all_gather(output_tensors",)),
    Name(
        "accelerate.utils.operations:_gpu_gather_object", "(object)", ("for y in output_objects",)
    ),
    Name("accelerate.state:PartialState.is_main_process", "(self)", ("self.process_index == 0",)),
    Name("accelerate.state:PartialState.use_distributed", "(self)", ("self.num_processes > 1",)),
    Name(
        _DISPATCHER + "__init__",
        None,
        ("self.state = PartialState()", "self.slice_fn = slice_tensors"),
    ),
    Name(_ACCELERATOR + "get_state_dict", "(self, model, unwrap=True)"),
    Name(
        _ACCELERATOR + "save_state",
        "(self, output_dir=None, safe_serialization=True, **save_model_func_kwargs)",
        (
            "self.get_state_dict(model, unwrap=False)",
            "hook(self._models, weights, output_dir)",
            "save_custom_state(obj, output_dir, i",
            "self.project_configuration.iteration += 1",
            'f"checkpoint_{self.save_iteration}"',
        ),
    ),
    Name(
        _ACCELERATOR + "load_state",
        "(self, input_dir=None, load_kwargs=None, **load_model_func_kwargs)",
        ("hook(models, input_dir)", "load_custom_state(obj, input_dir, index)"),
    ),
    Name(
        _OPERATIONS + "ConvertOutputsToFp32.__call__",
        "(self, *args, **kwargs)",
        ("convert_to_fp32(self.model_forward(*args, **kwargs))",),
    ),
    # accelerate: used
    Name(
        "accelerate.checkpointing:save_accelerator_state",
        "(output_dir, model_states, optimizers, schedulers, dataloaders, process_index, step, "
        "scaler=None, save_on_each_node=False, safe_serialization=True)",
        (
            'weights_name.replace(".", f"_{i}.")',
            'f"{SCHEDULER_NAME}.bin" if i == 0 else f"{SCHEDULER_NAME}_{i}.bin"',
            '"dl_state_dict.bin" if i == 0 else f"dl_state_dict_{i}.bin"',
            'f"{RNG_STATE_NAME}_{process_index}.pkl"',
            'states["torch_cuda_manual_seed"]',
        ),
    ),
    Name(
        "accelerate.checkpointing:save_custom_state",
        "(obj, path, index=0, save_on_each_node=False)",
        ('f"custom_checkpoint_{index}.pkl"',),
    ),
    Name("accelerate.state:AcceleratorState._shared_state"),
    Name("accelerate.state:PartialState._shared_state"),
    Name(_ARGUMENTS + "world_size", None, ("self.distributed_state.num_processes",)),
    Name(_ARGUMENTS + "process_index", None, ("self.distributed_state.process_index",)),
    Name(_DISPATCHER + "__iter__", None, ("slice(0, self.state.num_processes)", "data_slice,")),
    Name("accelerate.data_loader:DataLoaderShard", None, ("self.rng_types = rng_types",)),
    # torch: replaced methods
    Name("torch.optim:Optimizer.add_param_group", "(self, param_group)"),
    Name(_DTENSOR + "__create_write_items__", "(self, fqn, object)"),
    Name(_DTENSOR + "__create_chunk_list__", "(self)", ("return [_create_chunk_from_dtensor(",)),
    Name(_DTENSOR + "__get_tensor_shard__", "(self, index)", ("return self.to_local()",)),
    Name("torch.distributed._state_dict_utils:_distribute_tensors", None, ("torch.is_tensor(_l",)),
    Name(
        "torch.nn.utils.clip_grad:_get_total_norm",
        "(tensors, norm_type=2.0, error_if_nonfinite=False, foreach=None)",
    ),
    # torch: used
    Name("torch.nn.utils.clip_grad:clip_grad_norm_", None, ("total_norm = _get_total_norm(",)),
    Name("torch.distributed.distributed_c10d:_get_default_store", "()"),
)
