"""What the library promises, and the tests that hold it to that.

Three tables of tests: ``CAPABILITIES``, by the number of the capability; ``DEFECTS``, those of the
released research code of Khodak et al. (2021) that this library must not have; and ``PITFALLS``,
what goes wrong, mostly in silence, where low-rank training, parametrized weights and wrapped
optimizers meet other software. To run a row: ``pytest $(python tests/test_capabilities.py D2)``.

The defects, which tests name by these numbers:

    D1   the decay of tensors is added after the backward pass and never acts
    D2   convolutions are decomposed by another index map than they are applied by
    D3   over-complete ranks get zero columns that never train
    D4   the files cannot be imported
    D5   lists of what not to decay are emptied before use: factors decay twice
    D6   parameters are chosen by parts of their names: norms lose their decay
    D7   scales of the plain initialization are listed by hand, one layer off
    D8   a misspelled name in a list is met by nothing, silently
    D9   a named initialization is called as if it were a function
    D10  replacing a nested module loses its siblings
    D11  resuming fails with several groups, or resets their options
    D12  frozen factors get gradients and move
    D13  no mixed precision: the decay vanishes in scaled gradients or overflows
    D14  factors are float32 on the CPU whatever the weight was; half precision fails
    D15  deprecated functions, and no truncated decomposition
    D16  signs are left to chance, and NaN is not looked for
    D17  groups and named paddings fail, padding modes are ignored, one kind of layer
    D18  the memory format is dropped
    D19  the bias is kept outside of the module tree
    D20  weights of attention are held in lists and written through views
    D21  a loop over modules and over heads, with dense decompositions
    D22  writes that autograd, hooks and compilers do not see
    D23  no way back to dense layers, and one fixed way to compute
    D24  checkpoints without shapes, ranks or settings
    D25  a tensor of the graph stays on the module: copies fail
    D26  sharing the work between processes is wrong under data parallelism
    D27  ranks relative to different sides; one searched scalar, no other rule
    D28  no tests, test images for validation, half of a network left dense
    D29  sparse gradients of lookup tables meet a dense decay
    D30  with adaptive optimizers the decay goes through the moments
"""

import ast
import functools
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent

CAPABILITIES = {
    1: (
        "linear layers: two factors, bias, inputs of any batch shape",
        [
            "tests/test_factored_forms.py::test_linear_equals_dense",
            "tests/test_parametrizations.py::test_full_rank_layer_is_the_dense_one",
            "tests/test_parametrizations.py::test_gradients_are_those_of_the_product",
        ],
    ),
    2: (
        "two-dimensional convolutions, read spatially: exact index map, two convolutions or one",
        [
            "tests/test_parametrizations.py::test_full_rank_convolution_is_the_dense_one_D2_D17",
            "tests/test_factored_forms.py::test_convolution_equals_dense",
            "tests/test_factored.py::test_the_cheaper_way_is_chosen",
            "tests/test_factored.py::test_the_choice_is_followed",
            "tests/test_parametrizations.py::test_gradients_through_a_convolution_are_those_of_the_product",
            "tests/test_overcomplete.py::test_one_convolution_runs",
        ],
    ),
    3: (
        "strides, paddings and their modes, dilations, groups",
        [
            "tests/test_parametrizations.py::test_full_rank_convolution_is_the_dense_one_D2_D17",
            "tests/test_factored_forms.py::test_padding_modes_equal_dense",
            "tests/test_parametrizations.py::test_padding_mode_is_not_ignored_D17",
            "tests/test_factored_forms.py::test_transposed_convolution_equals_dense",
            "tests/test_ranks.py::test_depthwise_convolutions_stay_dense_unless_named",
        ],
    ),
    4: (
        "deep and wide layers, trained as one convolution and collapsed exactly",
        [
            "tests/test_overcomplete.py::test_one_convolution_runs",
            "tests/test_overcomplete.py::test_it_starts_as_the_dense_layer",
            "tests/test_overcomplete.py::test_it_collapses_exactly",
            "tests/test_overcomplete.py::test_its_size_is_that_of_the_factors",
            "tests/test_overcomplete.py::test_it_trains",
            "tests/test_ranks.py::test_an_explicit_rank_is_obeyed",
        ],
    ),
    5: (
        "embeddings, and weights that are tied",
        [
            "tests/test_factored_forms.py::test_embedding_equals_dense",
            "tests/test_factored_forms.py::test_embedding_bag_equals_dense",
            "tests/test_registry.py::test_tied_weights_are_left_dense_and_listed",
            "tests/test_registry.py::test_untied_weights_get_a_copy_of_their_own",
            "tests/third_party/test_models.py::test_tied_weights_that_are_swept_in_stay_tied",
            "tests/third_party/test_models.py::test_untied_weights_are_their_own",
        ],
    ),
    6: (
        "query–key and output–value products: heads, fused, cross and grouped-query attention",
        [
            "tests/test_attention.py::test_every_attention_has_two_products",
            "tests/test_attention.py::test_products_are_the_loops_over_heads",
            "tests/third_party/test_transformers_attention.py::test_products_are_the_loops_over_heads",
            "tests/with_timm/test_timm_attention.py::test_products_are_the_loops_over_heads",
            "tests/test_attention.py::test_heads_that_do_not_fit_are_refused",
            "tests/third_party/test_transformers_attention.py::test_a_wrong_number_of_heads_is_refused_by_name",
            "tests/test_attention.py::test_products_of_subclasses_with_a_forward_of_their_own_are_fixed",
        ],
    ),
    7: (
        "spectral initialization of a given weight or a fresh one, in float32 or better",
        [
            "tests/test_init.py::test_error_is_the_smallest_possible",
            "tests/test_init.py::test_every_dtype_and_shape",
            "tests/test_parametrizations.py::test_spectral_initialization_is_optimal_through_a_module",
            "tests/test_parametrizations.py::test_spectral_initialization_of_convolutions_is_optimal_D2",
            "tests/test_checkpoints.py::test_reset_parameters_draws_the_dense_weights_and_factorizes_them",
            "tests/third_party/test_models.py::test_a_loaded_model_is_factorized",
        ],
    ),
    8: (
        "over-complete ranks without dead directions",
        [
            "tests/test_init.py::test_no_column_is_zero",
            "tests/test_parametrizations.py::test_overcomplete_convolution_has_no_dead_direction_D3",
            "tests/test_decompositions.py::test_no_column_is_dead",
            "tests/test_overcomplete.py::test_it_trains",
        ],
    ),
    9: (
        "balanced heads that keep the function, from small decompositions",
        [
            "tests/test_attention.py::test_balancing_keeps_the_function_of_every_attention",
            "tests/test_init.py::test_balancing_keeps_the_product_and_balances",
            "tests/test_init.py::test_balancing_equals_spectral_initialization_of_the_product",
            "tests/test_init.py::test_balancing_never_forms_the_dense_product",
            "tests/test_attention.py::test_balancing_heads_never_forms_their_products",
            "tests/third_party/test_transformers_attention.py::test_rotary_embeddings_forbid_to_balance_scores",
        ],
    ),
    10: (
        "initializations that are not spectral, with the variance of the product",
        [
            "tests/test_init.py::test_kaiming_is_the_papers_non_spectral_baseline",
            "tests/test_init.py::test_matched_keeps_the_weights_mean_square",
            "tests/test_init.py::test_every_init_gives_the_same_shapes",
            "tests/test_tensorized.py::test_matched_factors_have_the_weights_mean_square",
        ],
    ),
    11: (
        "the penalty and its exact gradient: two, three and any number of factors, batches",
        [
            "tests/test_product.py::test_value_equals_the_dense_norm",
            "tests/test_product.py::test_gradients_agree_with_autograd",
            "tests/test_product.py::test_euler_identity",
            "tests/test_product.py::test_a_batch_is_the_sum_of_its_products",
            "tests/test_backends.py::test_every_backend_adds_the_exact_gradient",
            "tests/test_backends.py::test_no_less_accurate_than_the_reference",
            "tests/test_triton.py::test_no_less_accurate_than_the_reference",
            "tests/test_triton.py::test_the_exact_gradient_is_added",
        ],
    ),
    12: (
        "decay as a gradient, as a loss term and decoupled; a coefficient for each group",
        [
            "tests/test_backends.py::test_add_equals_backward_of_the_penalty",
            "tests/test_product.py::test_penalty_backward_is_the_gradient",
            "tests/test_optimizer.py::test_coupled_decay_is_the_base_on_loss_plus_penalty",
            "tests/test_optimizer.py::test_decoupled_decay_is_the_formula",
            "tests/test_optimizer.py::test_mode_overrides_what_the_base_does",
            "tests/test_optimizer_groups.py::test_every_group_decays_by_its_own_coefficient",
        ],
    ),
    13: (
        "order: unscale, accumulate, clip, decay; losses that are sums",
        [
            "tests/test_optimizer_torch.py::test_the_loss_scale_does_not_matter",
            "tests/test_optimizer_torch.py::test_a_skipped_step_decays_nothing",
            "tests/test_optimizer.py::test_decay_acts_once_for_accumulated_gradients",
            "tests/test_optimizer.py::test_clipping_comes_before_the_decay",
            "tests/test_decay_arms.py::test_a_summed_loss_takes_the_count_times_the_coefficient",
            "tests/third_party/test_trainer.py::test_accumulation_and_clipping",
        ],
    ),
    14: (
        "data parallel, sharded and tensor parallel training; what is refused",
        [
            "tests/test_distributed.py::test_data_parallel_training_is_that_of_one_process",
            "tests/test_distributed.py::test_every_layout_is_exact",
            "tests/test_distributed.py::test_a_step_communicates_once",
            "tests/test_distributed.py::test_sharded_training_is_that_of_one_process",
            "tests/test_distributed.py::test_refused",
            "tests/test_parallel.py::test_equal_to_one_process",
            "tests/test_partitions.py::test_flat_parameters_are_refused",
            "tests/test_partitions.py::test_zero1_is_the_optimizer_it_shards",
        ],
    ),
    15: (
        "param groups with the factors apart, told by identity",
        [
            "tests/test_groups.py::test_dense_weights_the_rest_and_factors",
            "tests/test_groups.py::test_factors_are_told_by_identity",
            "tests/test_groups.py::test_every_trainable_parameter_is_in_one_group",
            "tests/test_optimizer_groups.py::test_weight_decay_of_factors_becomes_frobenius_decay",
            "tests/with_timm/test_bases.py::test_groups_agree_with_timms",
        ],
    ),
    16: (
        "factorizing by selectors, exact paths, shared and tied weights, dry runs",
        [
            "tests/test_registry.py::test_include_takes_what_the_selector_says",
            "tests/test_registry.py::test_exclude_leaves_out_what_the_selector_says",
            "tests/test_registry.py::test_siblings_in_a_container_survive_D10",
            "tests/test_registry.py::test_a_shared_module_is_factorized_once",
            "tests/test_registry.py::test_tied_weights_are_left_dense_and_listed",
            "tests/test_ranks.py::test_plan_is_a_dry_run_of_factorize",
            "tests/test_ranks.py::test_planning_changes_nothing",
            "tests/test_bad_input.py::test_an_error_half_way_leaves_everything_as_it_was",
        ],
    ),
    17: (
        "ranks: a scale, numbers, by layer, by energy, for a budget with the share attained",
        [
            "tests/test_ranks.py::test_an_explicit_rank_is_obeyed",
            "tests/test_ranks.py::test_rank_fraction_is_of_the_smaller_side_D27",
            "tests/test_ranks.py::test_per_layer_ranks_take_the_exact_name_first",
            "tests/test_ranks.py::test_energy_takes_the_smallest_sufficient_rank",
            "tests/test_ranks.py::test_ratio_search_finds_the_nearest_attainable_D27",
            "tests/test_ranks.py::test_the_table_is_aligned_and_complete",
        ],
    ),
    18: (
        "back to dense layers or to plain chains, exactly; factorized again at another rank",
        [
            "tests/test_registry.py::test_merge_is_exact_at_full_rank_D23",
            "tests/test_registry.py::test_merge_computes_the_same",
            "tests/test_registry.py::test_unroll_gives_plain_torch_layers_with_the_same_function_D23",
            "tests/test_overcomplete.py::test_it_collapses_exactly",
            "tests/test_refusals.py::test_a_merged_layer_can_be_factorized_at_another_rank",
        ],
    ),
    19: (
        "Tucker, tensor train and CP: dimensions, ranks, decompositions, decay",
        [
            "tests/test_tensorized.py::test_the_flat_rule",
            "tests/test_tensorized.py::test_default_readings",
            "tests/test_tensorized.py::test_any_pattern_is_right",
            "tests/test_decompositions.py::test_rank_rules",
            "tests/test_decompositions.py::test_full_ranks_are_exact",
            "tests/test_decompositions.py::test_tucker_errors_are_between_their_bounds",
            "tests/test_decompositions.py::test_train_errors_are_between_their_bounds",
            "tests/test_decompositions.py::test_cp_finds_the_terms_of_a_cp_tensor",
            "tests/test_tensorized.py::test_forward_is_that_of_the_merged_layer",
            "tests/test_stars.py::test_gradients_agree_with_autograd",
            "tests/test_stars.py::test_the_tensor_is_never_formed",
            "tests/test_tensorized.py::test_decay_is_the_dense_penalty",
            "tests/test_tensorized.py::test_ratio_is_attained",
            "tests/test_tensorized.py::test_the_separable_recipe",
        ],
    ),
    20: (
        "decay to compare with: of each factor, scaled by the kept share, none",
        [
            "tests/test_decay_arms.py::test_arms_of_plain_decay_are_one_line",
            "tests/test_decay_arms.py::test_the_arm_of_the_product_takes_the_same_groups",
            "tests/test_optimizer.py::test_without_decay_the_trajectory_is_the_base_bitwise",
        ],
    ),
    21: (
        "product norms recorded in one run and replayed in another",
        [
            "tests/test_replay.py::test_a_run_without_decay_follows_the_norms_of_one_with_it",
            "tests/test_replay.py::test_every_kind_of_product_is_scaled_evenly",
            "tests/test_replay.py::test_norms_alone_are_those_of_a_full_record",
            "tests/test_replay.py::test_what_cannot_be_replayed_is_refused",
            "tests/test_experiments.py::test_normalized_trials_have_the_norms_of_the_others",
        ],
    ),
    22: (
        "diagnostics: norms, bound, balance, effective step, ranks",
        [
            "tests/test_diagnostics.py::test_numbers_follow_from_the_dense_spectrum",
            "tests/test_diagnostics.py::test_spectrum_is_that_of_the_dense_product",
            "tests/test_diagnostics.py::test_bound_holds_and_is_tight_where_balanced",
            "tests/test_diagnostics.py::test_imbalance_looks_at_every_bond_of_a_chain",
            "tests/test_diagnostics.py::test_resumed_history_is_the_uninterrupted_one",
            "tests/test_theory.py::test_the_effective_step_is_that_of_the_direction",
        ],
    ),
    23: (
        "FLAMBe, in the library's own definition",
        [
            "tests/test_flambe.py::test_it_is_the_equation",
            "tests/test_flambe.py::test_the_decay_is_inside_of_the_trust_ratio",
            "tests/test_flambe.py::test_resume_is_bitwise",
            "tests/test_flambe.py::test_a_transformer_learns",
        ],
    ),
    24: (
        "checkpoints with shapes, ranks and a version; dtypes, devices, resuming",
        [
            "tests/test_checkpoints.py::test_round_trip",
            "tests/test_checkpoints.py::test_every_kind_makes_the_round_trip",
            "tests/test_checkpoints.py::test_wrong_files_change_nothing",
            "tests/test_checkpoints.py::test_a_dense_state_dict_loads_into_a_factorized_model",
            "tests/test_optimizer_state.py::test_resuming_is_going_on",
            "tests/test_distributed.py::test_a_killed_process_and_a_restart_from_the_checkpoint",
            "tests/test_optimizer_state.py::test_moved_parameters_decay",
        ],
    ),
    25: (
        "the paper's experiments: models, protocols, interruption, tables, claims",
        [
            "tests/test_models.py::test_parameters_are_those_of_the_paper",
            "tests/test_models.py::test_ratios_are_those_of_the_paper",
            "tests/test_models.py::test_tensor_networks_have_the_parameters_of_the_paper",
            "tests/test_experiments.py::test_every_preset_makes_its_jobs",
            "tests/test_experiments.py::test_an_interrupted_trial_ends_in_the_same_result",
            "tests/third_party/test_experiments.py::test_an_interrupted_trial_ends_in_the_same_result",
            "tests/test_experiments.py::test_summaries_are_paired_by_seed",
            "tests/test_verdicts.py::test_a_claim_is_judged_by_the_interval",
        ],
    ),
    26: (
        "the defects of the research code, and the identities of the theory",
        [
            "tests/test_capabilities.py::test_every_defect_has_tests",
            "tests/test_init.py::test_half_the_sum_of_squares_is_the_nuclear_norm",
            "tests/test_diagnostics.py::test_bound_holds_and_is_tight_where_balanced",
            "tests/test_theory.py::test_decay_of_three_factors_bounds_a_schatten_quasi_norm",
            "tests/test_init.py::test_si_never_lengthens",
            "tests/test_theory.py::test_the_effective_step_is_that_of_the_direction",
            "tests/test_theory.py::test_singular_values_shrink_by_the_law",
            "tests/test_theory.py::test_only_frobenius_decay_turns_the_weight",
            "tests/test_product.py::test_value_does_not_depend_on_the_gauge",
        ],
    ),
}

DEFECTS = {
    "D1": [
        "tests/test_tensorized.py::test_decay_is_the_dense_penalty",
        "tests/test_stars.py::test_frobenius_decay_shrinks_the_norm",
        "tests/test_optimizer.py::test_coupled_decay_is_the_base_on_loss_plus_penalty",
        "tests/test_optimizer.py::test_coupled_decay_acts",
    ],
    "D2": [
        "tests/test_parametrizations.py::test_full_rank_convolution_is_the_dense_one_D2_D17",
        "tests/test_parametrizations.py::test_spectral_initialization_of_convolutions_is_optimal_D2",
    ],
    "D3": [
        "tests/test_init.py::test_no_column_is_zero",
        "tests/test_parametrizations.py::test_overcomplete_convolution_has_no_dead_direction_D3",
        "tests/test_decompositions.py::test_no_column_is_dead",
    ],
    "D4": [
        "tests/test_package.py::test_core_imports_torch_and_einops_only",
    ],
    "D5": [
        "tests/test_optimizer_groups.py::test_weight_decay_of_factors_becomes_frobenius_decay",
        "tests/test_optimizer_groups.py::test_weight_decay_set_later_is_refused",
        "tests/third_party/test_trainer.py::test_it_trains_and_no_factor_decays_twice",
    ],
    "D6": [
        "tests/test_optimizer_groups.py::test_groups_without_weight_decay_stay_whole",
        "tests/test_groups.py::test_factors_are_told_by_identity",
        "tests/test_registry.py::test_exclude_leaves_out_what_the_selector_says",
    ],
    "D7": [
        "tests/test_init.py::test_matched_keeps_the_weights_mean_square",
        "tests/test_init.py::test_kaiming_is_the_papers_non_spectral_baseline",
    ],
    "D8": [
        "tests/test_optimizer_groups.py::test_groups_without_weight_decay_stay_whole",
        "tests/test_optimizer_groups.py::test_weight_decay_set_later_is_refused",
        "tests/test_bad_input.py::test_wrong_arguments",
        "tests/test_attention.py::test_selectors_that_take_nothing_are_refused",
        "tests/test_groups.py::test_what_makes_no_sense_is_refused",
    ],
    "D9": [
        "tests/test_init.py::test_every_init_gives_the_same_shapes",
        "tests/test_init.py::test_wrong_init_and_depth_are_refused",
    ],
    "D10": [
        "tests/test_registry.py::test_siblings_in_a_container_survive_D10",
    ],
    "D11": [
        "tests/test_optimizer_state.py::test_resuming_is_going_on",
        "tests/test_optimizer_state.py::test_a_plain_checkpoint_of_several_groups_loads",
    ],
    "D12": [
        "tests/test_backends.py::test_none_and_frozen_are_left_alone",
        "tests/test_optimizer.py::test_a_frozen_factor_is_a_constant",
    ],
    "D13": [
        "tests/test_optimizer_torch.py::test_the_loss_scale_does_not_matter",
        "tests/test_optimizer_torch.py::test_a_skipped_step_decays_nothing",
        "tests/test_optimizer_torch.py::test_half_precision_gradients_under_a_scaler_are_refused",
        "tests/test_optimizer_torch.py::test_coupled_decay_of_half_precision_is_accumulated_in_float32",
    ],
    "D14": [
        "tests/test_parametrizations.py::test_factors_have_dtype_and_are_accurate_D14",
        "tests/test_init.py::test_every_dtype_and_shape",
    ],
    "D15": [
        "tests/test_init.py::test_every_dtype_and_shape",
        "tests/test_init.py::test_the_float32_route_is_as_exact_as_float64",
        "tests/test_init.py::test_randomized_is_near_the_best_where_singular_values_fall",
    ],
    "D16": [
        "tests/test_init.py::test_signs_are_fixed",
        "tests/test_parametrizations.py::test_the_same_weight_gives_the_same_factors_D16",
        "tests/test_bad_input.py::test_weights_without_numbers_are_an_error",
    ],
    "D17": [
        "tests/test_parametrizations.py::test_full_rank_convolution_is_the_dense_one_D2_D17",
        "tests/test_parametrizations.py::test_padding_mode_is_not_ignored_D17",
        "tests/test_parametrizations.py::test_full_rank_layer_is_the_dense_one",
        "tests/test_attention.py::test_products_are_the_loops_over_heads",
    ],
    "D18": [
        "tests/test_parametrizations.py::test_channels_last_activations_stay_channels_last_D18",
        "tests/test_factored_forms.py::test_convolution_keeps_the_memory_format",
    ],
    "D19": [
        "tests/test_registry.py::test_functional_call_uses_the_given_parameters_D19",
        "tests/test_attention.py::test_products_look_parameters_up_in_the_module_tree",
        "tests/test_parametrizations.py::test_functional_call_sees_the_factors_of_recurrent_layers_D19",
    ],
    "D20": [
        "tests/test_attention.py::test_products_follow_weights_that_are_replaced",
        "tests/test_registry.py::test_products_are_in_module_order_and_follow_their_parameters_D20",
        "tests/test_backends.py::test_swapped_and_moved_parameters_are_followed",
        "tests/test_attention.py::test_decay_writes_through_views_of_any_memory_layout",
        "tests/test_optimizer.py::test_a_factor_in_a_view_of_a_parameter_decays",
    ],
    "D21": [
        "tests/test_backends.py::test_small_products_share_calls_and_large_ones_do_not",
        "tests/test_attention.py::test_heads_and_layers_run_together",
        "tests/test_attention.py::test_balancing_heads_never_forms_their_products",
        "tests/test_init.py::test_balancing_never_forms_the_dense_product",
        "tests/test_triton.py::test_two_launches_for_all_shapes",
    ],
    "D22": [
        "tests/test_registry.py::test_writes_by_an_optimizer_reach_the_weight_D22",
        "tests/test_optimizer.py::test_all_updates_use_the_factors_before_the_step",
        "tests/test_factored_torch.py::test_cached_sees_a_step_of_the_optimizer",
        "tests/test_triton.py::test_autograd_learns_of_the_change",
    ],
    "D23": [
        "tests/test_registry.py::test_merge_computes_the_same",
        "tests/test_registry.py::test_unroll_gives_plain_torch_layers_with_the_same_function_D23",
        "tests/test_factored.py::test_the_choice_is_followed",
        "tests/test_factored_torch.py::test_cached_forms_the_product_once",
    ],
    "D24": [
        "tests/test_ranks.py::test_a_plan_can_be_repeated_on_a_copy_D24",
        "tests/test_checkpoints.py::test_every_kind_makes_the_round_trip",
        "tests/test_checkpoints.py::test_a_factorized_state_dict_of_another_structure_is_refused",
    ],
    "D25": [
        "tests/test_parametrizations.py::test_a_copy_works_after_a_forward_D25",
        "tests/test_tensorized.py::test_copies_after_a_forward_pass",
    ],
    "D26": [
        "tests/test_distributed.py::test_data_parallel_training_is_that_of_one_process",
        "tests/test_distributed.py::test_every_layout_is_exact",
        "tests/test_distributed.py::test_copies_are_rounded_alike",
        "tests/test_distributed.py::test_refused",
    ],
    "D27": [
        "tests/test_ranks.py::test_ratio_search_finds_the_nearest_attainable_D27",
        "tests/test_ranks.py::test_ratio_counts_all_parameters_of_the_model_D27",
        "tests/test_ranks.py::test_rank_fraction_is_of_the_smaller_side_D27",
        "tests/test_ranks.py::test_energy_takes_the_smallest_sufficient_rank",
    ],
    "D28": [
        "tests/test_quickstart.py::test_every_format_gives_three_disjoint_parts",
        "tests/test_ranks.py::test_every_block_of_a_stage_is_factorized_D28b",
        "tests/test_models.py::test_what_stays_dense_is_named_rightly",
    ],
    "D29": [
        "tests/test_backends.py::test_sparse_gradients_are_refused",
        "tests/test_optimizer_groups.py::test_sparse_gradients_are_refused",
        "tests/test_bad_input.py::test_a_weight_that_cannot_be_factorized_is_listed_by_default",
    ],
    "D30": [
        "tests/test_optimizer.py::test_decoupled_decay_is_the_formula",
        "tests/test_optimizer.py::test_mode_overrides_what_the_base_does",
        "tests/third_party/test_bases.py::test_decay_is_the_bases_own",
    ],
}

PITFALLS = {
    # decay of low-rank training
    "decay of an adapter pulls to the pretrained weight instead of to zero": [
        "tests/third_party/test_lora.py::test_delta_is_what_peft_adds",
        "tests/third_party/test_lora.py::test_full_is_what_peft_merges",
        "tests/test_shifted.py::test_it_decays_to_zero",
    ],
    "the decoupled decay of an adapter's product has to be written by hand": [
        "tests/third_party/test_lora.py::test_decoupled_decay_is_the_formula",
        "tests/third_party/test_lora.py::test_a_changed_scaling_is_read_anew",
    ],
    "λ by layer or by schedule": [
        "tests/test_optimizer_groups.py::test_every_group_decays_by_its_own_coefficient",
        "tests/test_optimizer_groups.py::test_the_coefficient_can_be_changed_between_steps",
        "tests/test_optimizer_groups.py::test_decoupled_decay_follows_the_learning_rate",
    ],
    "decay of bfloat16 parameters does nothing": [
        "tests/test_optimizer_torch.py::test_decoupled_decay_acts_in_expectation",
        "tests/test_flambe.py::test_half_precision_moves_in_expectation",
        "tests/third_party/test_trainer.py::test_bf16_parameters_decay_and_resume",
    ],
    "low-rank training from scratch diverges": [
        "tests/test_init.py::test_si_never_lengthens",
        "tests/test_theory.py::test_decay_is_stable_below_two",
        "tests/test_diagnostics.py::test_a_run_that_diverged_measures_as_nan",
        "tests/test_tensorized.py::test_training_with_frobenius_decay",
        "tests/test_flambe.py::test_a_transformer_learns",
    ],
    "no decomposition of linear layers, or NaN from one": [
        "tests/test_parametrizations.py::test_spectral_initialization_is_optimal_through_a_module",
        "tests/test_bad_input.py::test_weights_without_numbers_are_an_error",
        "tests/test_tensorized.py::test_the_plan_has_the_error_of_the_initialization",
    ],
    "adapters exist, factorized weights do not": [
        "tests/third_party/test_models.py::test_every_matrix_of_the_blocks_is_taken",
        "tests/third_party/test_models.py::test_full_rank_is_the_dense_model",
        "tests/with_timm/test_timm.py::test_full_rank_is_the_dense_model",
    ],
    "the dense weight is kept beside its factors": [
        "tests/test_refusals.py::test_the_dense_weight_is_let_go",
        "tests/test_stacking.py::test_stacks_are_bounded",
    ],
    "the penalty as a loss term, also of three factors": [
        "tests/test_product.py::test_penalty_backward_is_the_gradient",
        "tests/test_product.py::test_penalty_is_twice_differentiable",
        "tests/test_backends.py::test_add_equals_backward_of_the_penalty",
    ],
    "factorized layers are slower than dense ones": [
        "tests/test_ranks.py::test_ratio_leaves_dense_and_lists_what_does_not_pay",
        "tests/test_factored.py::test_the_cheaper_way_is_chosen",
        "tests/test_tensorized.py::test_few_positions_take_the_dense_weight",
    ],
    # parametrized weights
    "a weight is computed anew at every access": [
        "tests/test_factored_torch.py::test_attention_runs_on_the_factors",
        "tests/test_factored_torch.py::test_cached_forms_the_product_once",
        "tests/test_factored.py::test_the_dense_tensor_is_formed_once",
        "tests/test_factored.py::test_a_kept_dense_tensor_is_never_stale",
    ],
    "attention ignores the forward of its output projection": [
        "tests/test_factored_torch.py::test_attention_runs_on_the_factors",
        "tests/test_parametrizations.py::test_attention_blocks_have_their_own_factors",
        "tests/test_factored_torch.py::test_transformer_layer_equals_dense",
    ],
    "dense checkpoints do not load": [
        "tests/test_checkpoints.py::test_a_dense_state_dict_loads_into_a_factorized_model",
        "tests/test_checkpoints.py::test_torchs_own_loading_names_weights_without_factors",
        "tests/test_checkpoints.py::test_merge_makes_a_checkpoint_that_the_original_class_loads",
        "tests/third_party/test_checkpoints.py::test_a_factorized_model_takes_the_dense_checkpoint",
    ],
    "from_pretrained draws factors anew": [
        "tests/third_party/test_checkpoints.py::test_save_pretrained_of_a_factorized_model_is_no_checkpoint",
        "tests/third_party/test_models.py::test_saved_factors_are_loaded_into_a_factorized_model",
        "tests/third_party/test_checkpoints.py::test_a_saved_model_is_rebuilt_from_its_configuration",
        "tests/third_party/test_checkpoints.py::test_from_pretrained_takes_the_merged_model",
    ],
    "a module cannot be pickled, or its copy is not apart": [
        "tests/test_refusals.py::test_a_module_that_cannot_be_pickled_says_what_can",
        "tests/test_registry.py::test_unrolled_layers_hold_the_factors_and_know_nothing_of_us",
        "tests/test_factored.py::test_a_copied_model_has_its_own_factors",
        "tests/test_factored.py::test_averaged_models_average_the_factors",
    ],
    "half precision fails with a message about something else": [
        "tests/test_parametrizations.py::test_not_implemented_never_escapes_right_inverse",
        "tests/test_parametrizations.py::test_factors_have_dtype_and_are_accurate_D14",
    ],
    "writes to the weight are lost": [
        "tests/test_factored.py::test_a_write_raises",
        "tests/test_factored_torch.py::test_a_write_in_a_compiled_function_raises",
        "tests/test_checkpoints.py::test_reset_parameters_draws_the_dense_weights_and_factorizes_them",
        "tests/third_party/test_models.py::test_initializing_factorized_weights_in_place_is_refused",
        "tests/third_party/test_models.py::test_initializing_an_initialized_model_changes_nothing",
    ],
    "a model on the meta device becomes NaN": [
        "tests/test_bad_input.py::test_weights_without_numbers_are_an_error",
        "tests/test_bad_input.py::test_factors_on_the_meta_device_are_refused_on_the_way_back",
        "tests/test_checkpoints.py::test_dense_weights_for_factors_without_numbers_are_refused",
        "tests/test_distributed.py::test_layer_by_layer_from_the_meta_device",
    ],
    "tied weights come apart, or cannot be tied again": [
        "tests/test_registry.py::test_tied_weights_are_left_dense_and_listed",
        "tests/third_party/test_models.py::test_a_tied_weight_that_was_named_is_refused",
        "tests/test_registry.py::test_ties_can_be_errors",
        "tests/third_party/test_models.py::test_tying_to_a_factorized_weight_is_refused",
        "tests/test_checkpoints.py::test_tied_weights_are_saved_once_and_stay_tied",
    ],
    "an optimizer built earlier lacks the factors": [
        "tests/test_optimizer_groups.py::test_an_optimizer_built_before_factorize_is_named",
        "tests/test_optimizer_groups.py::test_factorizing_after_wrapping_is_noticed",
        "tests/test_optimizer_groups.py::test_merging_after_wrapping_is_noticed",
        "tests/test_optimizer_groups.py::test_factors_of_a_later_factorization_can_be_added",
        "tests/third_party/test_trainer.py::test_factorizing_after_the_optimizer_is_refused",
    ],
    "freezing a weight after it was factorized": [
        "tests/test_refusals.py::test_freezing_goes_through_the_module_before_and_after",
        "tests/test_factored.py::test_a_frozen_factor_stays_a_constant",
    ],
    "an adapter merged into a factorized weight is lost": [
        "tests/third_party/test_models.py::test_merging_an_adapter_into_factors_is_refused",
        "tests/third_party/test_models.py::test_an_adapter_is_merged_into_the_merged_weights",
        "tests/third_party/test_models.py::test_adapters_stay_as_they_are",
    ],
    "compiling and exporting": [
        "tests/test_factored_torch.py::test_compiles_without_graph_breaks",
        "tests/test_factored_torch.py::test_cached_around_and_inside_a_compiled_function",
        "tests/test_factored_torch.py::test_export_is_two_products",
        "tests/test_factored_torch.py::test_jit_trace_follows_the_factors",
        "tests/test_refusals.py::test_factorizing_while_compiling_changes_nothing",
        "tests/third_party/test_models.py::test_compiled_models_are_one_graph_with_the_same_gradients",
    ],
    "data parallel wrappers": [
        "tests/test_factored.py::test_distributed_data_parallel_takes_the_factors",
        "tests/test_bad_input.py::test_data_parallel_wrappers_are_refused",
    ],
    "flat parameters of sharding engines": [
        "tests/test_partitions.py::test_flat_parameters_are_refused",
        "tests/test_partitions.py::test_flat_weights_are_not_factorized",
        "tests/test_conventions.py::test_flat_parameters_are_recognized",
    ],
    "sharding before and after factorizing": [
        "tests/test_distributed.py::test_every_layout_is_exact",
        "tests/test_bad_input.py::test_sharded_weights_are_refused",
        "tests/third_party/test_accelerate_fsdp2.py::test_prepared_training_is_that_of_one_process",
    ],
    "tensor parallel plans fail on parametrized modules": [
        "tests/test_parallel.py::test_equal_to_one_process",
        "tests/test_parallel.py::test_refusals",
        "tests/third_party/test_lora.py::test_tensor_parallel_layers_are_refused",
    ],
    "safetensors refuse shared memory": [
        "tests/third_party/test_checkpoints.py::test_the_trainers_safetensors_have_no_shared_memory",
        "tests/test_checkpoints.py::test_round_trip",
    ],
    # optimizers around optimizers
    "it is not an Optimizer": [
        "tests/test_optimizer_groups.py::test_schedulers_see_an_optimizer",
        "tests/test_optimizer.py::test_methods_have_torchs_signatures",
        "tests/test_optimizer.py::test_its_objects_are_the_bases",
    ],
    "Accelerate does not see it": [
        "tests/third_party/test_accelerate.py::test_prepare_tracks_it_and_changes_nothing",
        "tests/third_party/test_accelerate.py::test_it_is_the_plain_loop",
    ],
    "its entries in the state break the base's": [
        "tests/test_optimizer_state.py::test_the_state_dict_is_the_bases_with_one_key",
        "tests/test_optimizer.py::test_without_decay_the_trajectory_is_the_base_bitwise",
        "tests/third_party/test_bases.py::test_without_decay_the_trajectory_is_the_base_bitwise",
    ],
    "groups go stale when a checkpoint is loaded": [
        "tests/test_conventions.py::test_a_schedule_goes_on_after_loading",
        "tests/test_optimizer.py::test_its_objects_are_the_bases",
    ],
    "hooks fire twice": [
        "tests/test_optimizer_torch.py::test_every_step_hook_fires_once",
        "tests/test_optimizer_torch.py::test_hooks_of_state_dicts_fire_once",
    ],
    "hooks are missing": [
        "tests/test_optimizer_torch.py::test_a_pre_hook_can_replace_the_closure",
        "tests/test_optimizer_torch.py::test_subclasses_may_patch_the_step",
        "tests/test_optimizer_torch.py::test_an_optimizer_that_shares_our_attributes_works",
    ],
    "loss scalers key on the object and its step": [
        "tests/test_optimizer_torch.py::test_the_loss_scale_does_not_matter",
        "tests/third_party/test_accelerate.py::test_a_loss_scale_does_not_matter",
        "tests/third_party/test_lightning.py::test_16_mixed",
    ],
    "fused steps see scaled gradients": [
        "tests/test_optimizer_torch.py::test_the_loss_scale_does_not_matter",
        "tests/test_optimizer_torch.py::test_a_skipped_step_decays_nothing",
        "tests/third_party/test_trainer.py::test_the_default_optimizer_is_fused",
    ],
    "closures are refused, or wipe the penalty": [
        "tests/test_optimizer.py::test_coupled_decay_is_the_base_on_loss_plus_penalty",
        "tests/test_optimizer.py::test_the_caller_gets_his_own_loss",
        "tests/test_optimizer.py::test_a_closure_may_return_nothing",
        "tests/third_party/test_lightning.py::test_it_is_the_plain_loop",
        "tests/third_party/test_bases.py::test_sams_two_steps_go_around_ours",
    ],
    "resuming breaks": [
        "tests/test_optimizer_state.py::test_resuming_is_going_on",
        "tests/test_optimizer_state.py::test_a_plain_checkpoint_loads",
        "tests/test_optimizer_state.py::test_a_bad_checkpoint_changes_nothing",
        "tests/third_party/test_bases.py::test_lookahead_resumes",
    ],
    "the dummy step of distributed checkpoints leaks into moments": [
        "tests/test_optimizer_state.py::test_distributed_checkpoints_initialize_nothing_but_zeros",
        "tests/test_optimizer_state.py::test_distributed_checkpoints_restore",
        "tests/test_dcp.py::test_resuming_is_going_on",
    ],
    "parameters are swapped after the wrapping": [
        "tests/test_optimizer_state.py::test_swapped_parameters_decay",
        "tests/test_optimizer_state.py::test_a_factor_replaced_in_the_model_only_is_named",
        "tests/third_party/test_accelerate_fsdp2.py::test_the_coefficient_survives_prepare",
    ],
    "a state that does not survive a round trip before the first step": [
        "tests/test_optimizer_state.py::test_the_round_trip_before_the_first_step_changes_nothing",
        "tests/third_party/test_accelerate.py::test_prepare_tracks_it_and_changes_nothing",
    ],
    "train and eval of the base cannot be reached": [
        "tests/test_optimizer.py::test_train_and_eval_are_there_if_the_base_has_them",
        "tests/third_party/test_accelerate.py::test_train_and_eval_reach_the_base",
    ],
    "one fused call for parameters of several meshes": [
        "tests/test_groups.py::test_meshes_are_kept_apart",
        "tests/test_distributed.py::test_the_order_of_products_and_meshes_does_not_matter",
    ],
    "DeepSpeed partitions": [
        "tests/test_partitions.py::test_partitions_of_deepspeed_are_refused",
        "tests/test_partitions.py::test_optimizers_of_deepspeed_are_refused",
        "tests/test_partitions.py::test_engines_of_deepspeed_are_refused",
    ],
    "optimizers of one layer each, or inside of the backward pass": [
        "tests/test_conventions.py::test_an_optimizer_for_each_parameter_is_refused",
        "tests/third_party/test_trainer.py::test_layerwise_optimizers_are_refused",
        "tests/test_partitions.py::test_zero1_inside_the_backward_pass_is_refused",
    ],
    "groups of a framework are hard to change": [
        "tests/third_party/test_trainer.py::test_it_trains_and_no_factor_decays_twice",
        "tests/third_party/test_trainer.py::test_all_ways_are_the_same",
        "tests/test_optimizer_groups.py::test_weight_decay_of_factors_becomes_frobenius_decay",
    ],
}

ROWS = {
    **{str(number): tests for number, (_, tests) in CAPABILITIES.items()},
    **DEFECTS,
    **PITFALLS,
}


@functools.cache
def functions(path: str) -> dict[str, ast.FunctionDef]:
    """Test functions of a file by name, which may need packages that are not installed here."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {node.name: node for node in found if node.name.startswith("test_")}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_tests_that_run(row):
    """Each exists, and is neither skipped nor expected to fail."""
    assert ROWS[row]
    for test in ROWS[row]:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), f"{path} is gone"
        assert name in functions(path), f"{test} is gone"
        marks = " ".join(map(ast.unparse, functions(path)[name].decorator_list))
        assert "mark.skip" not in marks, f"{test} may be skipped"
        assert "xfail" not in marks, f"{test} may be expected to fail"


def test_every_capability_has_a_row():
    """Numbers 1 to 26."""
    assert set(CAPABILITIES) == set(range(1, 27))


def test_every_defect_has_tests():
    """Numbers 1 to 30, each with its line in the text above."""
    assert list(DEFECTS) == [f"D{n}" for n in range(1, 31)]
    lines = [line.split() for line in (__doc__ or "").splitlines()]
    assert {line[0] for line in lines if len(line) > 1} >= set(DEFECTS)


if __name__ == "__main__":
    for key in sys.argv[1:]:
        print(*ROWS[key])
