"""Every name of peft and trl that the integrations replace or rely on; see ``names``.

Data only, held by tests/adapters/test_names.py.
"""

from __future__ import annotations

from hf_sp.patching import Name

_LORA = "peft.tuners.lora.layer:"
_TUNERS = "peft.tuners.tuners_utils:"
_FILES = "peft.utils.save_and_load:"
_OTHER = "peft.utils.other:"
_SFT = "trl.trainer.sft_trainer:"
_DPO = "trl.trainer.dpo_trainer:"
_KTO = "trl.trainer.kto_trainer:"
_FUSED = (
    "(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=('log_probs',))",
    ("weight.full_tensor()", "fused_lm_head=False, labels=None, shift_labels=None"),
)

NAMES: tuple[Name, ...] = (
    # peft: replaced
    Name(_LORA + "LoraLayer._get_in_out_features", "(self, module)"),
    Name(
        _TUNERS + "BaseTuner.inject_adapter",
        "(self, model, adapter_name, autocast_adapter_dtype=True, low_cpu_mem_usage=False, "
        "state_dict=None)",
        ("set_additional_trainable_modules(", "self._create_and_replace("),
    ),
    Name(
        "peft.tuners.lora.dora:DoraLinearLayer.update_layer",
        "(self, *, base_layer, lora_A, lora_B, scaling, place_on_cpu=False)",
        ("weight = dequantize_module_weight(base_layer)",),
    ),
    Name(
        "peft.peft_model:PeftModel.add_adapter",
        "(self, adapter_name, peft_config, low_cpu_mem_usage=False, autocast_adapter_dtype=True)",
    ),
    Name(
        "peft.peft_model:PeftModel.save_pretrained",
        "(self, save_directory, safe_serialization=True, selected_adapters=None, "
        "save_embedding_layers='auto', is_main_process=True, "
        "path_initial_model_for_weight_conversion=None, **kwargs)",
        ('state_dict=kwargs.get("state_dict", None)', "if is_main_process and safe_serialization"),
    ),
    Name(
        _FILES + "_reshard_dtensor_values_for_load",
        "(model, state_dict)",
        ("tensor.shape != ref._local_tensor.shape",),
    ),
    Name("peft.tuners.lora.model:LoraModel.add_weighted_adapter"),
    Name(
        "peft.utils.hotswap:hotswap_adapter_from_state_dict",
        "(model, state_dict, adapter_name, config, parameter_prefix='lora_')",
    ),
    # peft: used
    Name(
        "peft.utils.transformers_weight_conversion:convert_peft_config_for_transformers",
        "(peft_config, model, conversions)",
    ),
    Name("transformers.conversion_mapping:get_model_conversion_mapping"),
    Name(
        _FILES + "get_peft_model_state_dict",
        "(model, state_dict=None, adapter_name='default', unwrap_compiled=False, "
        "save_embedding_layers='auto')",
        ("gather_state_dict_for_save",),
    ),
    Name(_FILES + "set_peft_model_state_dict", None, ("model.load_state_dict(",)),
    Name(_TUNERS + "BaseTunerLayer.get_base_layer"),
    Name(_TUNERS + "BaseTunerLayer.active_adapters"),
    Name(_TUNERS + "check_adapters_to_merge", "(module, adapter_names=None)"),
    Name(_TUNERS + "check_target_module_exists", "(config, key)"),
    Name(_LORA + "VARIANT_KWARG_KEYS"),
    Name(
        _LORA + "LoraLayer.update_layer",
        None,
        (
            "nn.Linear(self.in_features, r, bias=False)",
            "nn.Linear(r, self.out_features, bias=lora_bias)",
            "self.lora_dropout.update(",
        ),
    ),
    Name(_LORA + "Linear.forward", None, ("lora_B(lora_A(dropout(x))) * scaling",)),
    Name(_LORA + "Embedding.forward", None, ("(after_A @ embedding_B) * scaling",)),
    Name(_OTHER + "ModulesToSaveWrapper.update", None, ("copy.deepcopy(self.original_module)",)),
    Name(_OTHER + "AuxiliaryTrainingWrapper"),
    # trl: replaced
    Name(_SFT + "add_fused_lm_head", *_FUSED),
    Name(_DPO + "add_fused_lm_head", *_FUSED),
    Name(_KTO + "add_fused_lm_head", *_FUSED),
    # trl: used
    Name("trl.trainer.utils:FusedCausalLMOutput"),
    Name(_SFT + "SFTTrainer.__init__", None, ("add_fused_lm_head(",)),
    Name(
        _SFT + "SFTTrainer.compute_loss",
        None,
        ("outputs.entropy.detach()", "fused_lm_head=True", "num_processes // self.get_tp_size()"),
    ),
    Name(_DPO + "DPOTrainer.__init__", None, ("add_fused_lm_head(",)),
    Name(_KTO + "KTOTrainer.__init__", None, ("add_fused_lm_head(",)),
)
