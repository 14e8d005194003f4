"""Every field of a run's config, at values meant for 8B and up. Small configs change what they must."""

import dataclasses

from ml_collections import ConfigDict

from charjax.model.config import ModelConfig


def get_config() -> ConfigDict:
  """The defaults of the recipe."""
  config = ConfigDict()
  config.seed = 0
  # Data, fsdp, tensor; -1 takes the devices that are left. Over fsdp the weights are split, and the batches too.
  config.mesh = (1, -1, 1)
  config.profile = False  # a trace of a few batches of each stage, for xprof, in its folder `profile`

  config.model = ConfigDict()
  # Or a .gguf file with SmolLM2's kind of tokenizer, a Hugging Face directory, hf://org/name, or the folder of a run,
  # for the policy that it trained.
  config.model.path = 'smollm2-135m-instruct'
  # Added to its weights: folders of PEFT adapters, or of runs that trained a LoRA; 'path:0.5' counts half.
  config.model.adapters = ()
  config.model.dtype = 'bfloat16'  # of the starting weights; what is trained is float32
  config.model.compute_dtype = 'bfloat16'  # of the operands of matrix products
  config.model.quantize = ''  # 'int8' or 'int4': projections are kept so, and LoRA alone is trained (needs qwix)
  # How attention is computed: 'xla', by matrix products with masks; 'cpu', by those a few rows at a time; 'tpu', by
  # kernels for it; 'auto': 'cpu' on CPUs, and else 'xla'.
  config.model.attention = 'auto'
  # What `charjax plan` is told of the model, so that no checkpoint is read: fields of model.config.ModelConfig.
  fields = dataclasses.fields(ModelConfig)
  config.model.shape = ConfigDict({f.name: 0 if f.default is dataclasses.MISSING else f.default for f in fields})
  config.model.scan_layers = True
  config.model.remat = True

  config.faults = ConfigDict()
  config.faults.grace_seconds = 25.0  # from SIGTERM to the end: a spot TPU has 30
  config.faults.lost_seconds = 60.0  # of silence, after which one of many processes is lost, and the others end
  config.faults.stuck_seconds = 1200.0  # in which none of them moves: what each was doing is told, and they end

  config.character = ConfigDict()
  config.character.path = 'assistant'  # a shipped character, or a .toml file; or several, as in 'stoic+poet'
  config.character.traits = ()  # empty: all; 'honesty:2' gives a trait another weight than the file does

  config.messages = ConfigDict()
  config.messages.train_per_trait = 450
  config.messages.heldout_per_trait = 50
  config.messages.train_neutral = 450
  config.messages.heldout_neutral = 50
  config.messages.seeds_shown = 4  # seed messages before each request for a new one
  config.messages.opening_words = 3  # a new message begins with up to so many words of an authored one; 0: with none
  config.messages.temperature = 0.8
  config.messages.top_p = 0.95
  config.messages.top_k = 0  # keeps so many of the most probable tokens; 0: all
  config.messages.max_new_tokens = 96
  config.messages.near_duplicate = 0.5  # share of word pairs two messages may have in common
  config.messages.batch_size = 128
  config.messages.prompt_width = 256  # prompts are padded to at least this many tokens

  config.replies = ConfigDict()
  config.replies.shown = 4
  config.replies.plain = 2
  config.replies.opposed = 1
  config.replies.show = 'trait'  # or 'character': all traits at once
  config.replies.examples = 4
  config.replies.temperature = 0.8
  config.replies.top_p = 0.95
  config.replies.top_k = 0
  config.replies.max_new_tokens = 512
  config.replies.batch_size = 128
  config.replies.prompt_width = 64

  config.rankings = ConfigDict()
  config.rankings.ranker = 'auto'  # likelihood, pairwise, pointwise, or the best of them on the choosing pairs
  config.rankings.examples = 4
  config.rankings.label_low = 0.05
  config.rankings.label_high = 0.95
  config.rankings.minimum_accuracy = 0.55  # lower 95% bound on the choosing pairs under which the run stops
  config.rankings.length_limit = 0.2  # |r| of score and length above which the effect of length is taken out
  config.rankings.skipped_replies = 20  # replies whose score is not finite are left out; more stop the run
  config.rankings.triples = 4  # messages a trait on which the pairwise ranker's transitivity is measured
  config.rankings.messages_per_chunk = 16
  config.rankings.batch_size = 32

  config.preference = ConfigDict()
  config.preference.labels = 'soft'  # or 'hard': the likelier of two replies is better for sure; ties stay ties
  config.preference.loss = 'bradley_terry'  # or 'margin', or 'plackett_luce': of whole rankings, without probabilities
  config.preference.head_steps = 60  # of fitting the heads to the starting weights, before anything else is trained
  config.preference.head_decay = 0.1
  config.preference.head_plain = 0.05  # share of the penalty on what varies among plain replies, where no trait speaks
  config.preference.length_limit = 0.2  # |r| of a trait's reward and length above which the effect is taken out
  config.preference.depth = 1.0  # share of the layers that the heads read through
  config.preference.lora_rank = 0  # 0 trains all parameters
  config.preference.lora_targets = ()  # of q, k, v, o, gate, up, down; empty: all that are not experts'
  config.preference.learning_rate = 3e-6
  config.preference.epochs = 1.0  # 0 leaves the weights as they are: the heads alone are trained
  config.preference.messages_per_batch = 16
  # Parts of a batch that go through the model one after another, to save memory; fewer where devices do not divide one.
  config.preference.microbatches = 1
  config.preference.warmup = 10
  config.preference.weight_decay = 0.01
  config.preference.max_gradient = 1.0
  config.preference.skipped_steps = 5  # as in the policy
  config.preference.save_every = 20
  # Of those that the other model was trained on: for the report's figures, and for the spread of each trait's reward.
  config.preference.measured_messages = 500

  config.policy = ConfigDict()
  config.policy.seed = 0  # added to the run's: another policy from the same messages, replies and rankings
  config.policy.traits = ()  # that are rewarded, of those of the run, all of which are measured; empty: all
  config.policy.lora_rank = 0
  config.policy.lora_targets = ()  # as in the preference model
  config.policy.learning_rate = 1e-6
  config.policy.steps = 200
  config.policy.prompts_per_step = 64
  config.policy.microbatches = 1  # as in the preference model
  config.policy.replies_per_prompt = 8  # that are drawn at each step; 0: none, and ranked or shown ones alone teach
  # What a drawn token is worth: 'grpo', beside the same place in the group's other replies; 'rloo', as its whole reply
  # beside the others; 'ppo', beside what a value head expects that is trained along.
  config.policy.advantages = 'grpo'
  config.policy.batch_size = 512  # replies that are drawn together, of those of a step
  # Of the ranked replies to the same message, preferred among each other: shown, opposed and plain in turn.
  config.policy.ranked_replies = 0
  # Share of the rankings in what is preferred; the rest is the preference model's, and all of it is where the held-out
  # judge learned from the ranking.
  config.policy.ranked_labels = 0.0
  config.policy.ranked_weight = 1.0  # of that preference loss, beside the policy gradient on drawn replies
  config.policy.ranked_beta = 0.1  # of that preference loss; the higher, the sooner a gain is enough
  config.policy.ranked_temperature = 1.0  # of the log-probs in it
  config.policy.ranked_likelihood = 0.0  # weight of the log-prob a token of the best ranked reply to each message
  # Of the replies that the trait was shown for, to the same message: on them the policy is drawn to the starting model
  # with the trait before it (context distillation).
  config.policy.shown_replies = 0
  config.policy.shown_weight = 1.0  # of the exact KL to it
  config.policy.temperature = 1.0
  config.policy.max_new_tokens = 512
  config.policy.prompt_width = 64
  config.policy.kl = 0.04
  config.policy.kl_target = 0.0  # nats a token: the weight above is adapted to it as training goes on; 0: it stays
  config.policy.clip = 0.2  # of the ratio to what was drawn from: a guard, since each draw is learned from once
  config.policy.trace = 1.0  # lambda of generalised advantages; below 1 a critic stands in for what is far off
  config.policy.other_traits = 0.0  # what a reply earns by all other traits together, beside 1 by its own
  config.policy.neutral_weight = 1.0  # of the exact KL on neutral messages
  config.policy.warmup = 5
  config.policy.weight_decay = 0.0
  config.policy.max_gradient = 1.0
  config.policy.skipped_steps = 5  # steps whose loss or gradient is not finite are skipped; so many stop the run
  config.policy.keep_unproven_traits = False  # also reward traits that the preference model cannot tell from chance
  config.policy.save_every = 20
  config.policy.samples_every = 10
  # Checkpoints, evenly spread, of which the held-out judge chooses the policy; until then each keeps the optimizer's
  # state, too. 1: the last is the policy.
  config.policy.candidates = 1
  config.policy.candidate_messages = 200  # training messages, unknown to the judge, by the replies to which it chooses

  config.evaluation = ConfigDict()
  config.evaluation.examples = 4
  config.evaluation.samples = 1  # replies to a message by the starting and by the trained model; one where prompted
  config.evaluation.temperature = 0.8
  config.evaluation.top_p = 0.95
  config.evaluation.top_k = 0
  config.evaluation.max_new_tokens = 512
  config.evaluation.batch_size = 128
  config.evaluation.prompt_width = 64
  config.evaluation.probes = ''  # JSON Lines: trait, message, consistent, inconsistent
  config.evaluation.neutral = ''  # JSON Lines: message, reference, expect (regex or null)

  # Replies are drawn as in the evaluation.
  config.behaviour = ConfigDict()
  config.behaviour.sets = (
    'likelihood',
    'rigidity',
    'robustness',
    'side_effects',
    'preference',
  )  # what is looked into; empty: nothing
  config.behaviour.messages = 12  # held-out messages of each trait, in each form
  config.behaviour.prompts = 20  # of each kind of authored prompt, of which there are 20 at most
  config.behaviour.conversations = 4  # about each trait
  config.behaviour.turns = 10
  config.behaviour.comparisons = 400  # pairs of traits and opposites between which the model chooses, in both orders
  return config
