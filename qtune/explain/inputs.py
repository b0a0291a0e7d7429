"""Kinds of faults in what qtune is given: the command line, recipes, data, models, runs. kinds.py reads it."""

from __future__ import annotations

INPUTS = """
= Q1: the command line and the recipe

Q101 A name that is not known
A value stands outside of a closed set: a scheme, a method, a key, an option.
> Take one of the legal values in the message. `qtune methods` and `qtune schemes` list those two with their options.

Q102 An option with an illegal value
An option of the command line, or its counterpart in Python, has a value outside of its range.
> The message gives the range.

Q103 Options that exclude or need each other
Two options say the same thing, contradict each other, or one makes no sense without the other.
> Leave one out, or add the one that the message names.

Q104 A recipe that cannot be read
The file is not there, is a folder, or is no text in UTF-8.
> Check the path. For a folder of a run, give its recipe.yaml, or `qtune train RUN --resume` to go on with it.

Q105 A recipe with faults
The recipe, or the changes after it on the command line, is no YAML, has keys that qtune does not know, values
of another type or outside of their range, or lacks a key. All faults are listed at once.
> Go through the list. `qtune keys` lists every key with its meaning and its legal values.

Q106 A key that this command needs
The recipe is legal, but it leaves out what this command works on: an output folder, data to train on, data to evaluate.
> Add the key to the recipe, or give it on the command line, as data.train=FILE.

Q107 Options of the adapter that do not fit
An option is not one of the method, is out of its range, or does not fit the size of a layer (a rank beyond the layer).
> Change the option named, or leave the layer out of adapter.targets. `qtune methods` lists the options of each method.

Q108 Options of the scheme that do not fit
The storage scheme has no such option, or the option has another type or range.
> Change the option named. `qtune schemes` lists them.

Q109 A pattern that matches no layer
adapter.targets, or a pattern under scheme, names layers that the model does not have. Names differ between
architectures: q_proj of Llama is c_attn in GPT-2.
> Take one of the names in the message; all-linear takes every packed linear layer of the decoder.

Q110 Not a size of memory
A size needs a number and a unit, and is at least one byte.
> Write it as 24GB, 7.5GiB or 800MB.

Q111 Several faults at once
What was looked at together has faults of several kinds.
> Each is in the message, with what is legal in its place.

= Q2: data

Q201 A data file that cannot be read
There is no such file, or the system refuses it (permissions, a folder, a device that is gone).
> Check the path. Paths in a recipe are taken from the folder that the command runs in.

Q202 A kind of data file that is not known
The kind of a file is told by how its name ends.
> Rename the file by what it holds: .jsonl, .json, .csv, .tsv, .parquet, .txt ...; all but Parquet may end in .gz.

Q203 Data that is not UTF-8 text
The file has bytes that are no UTF-8, as files saved by older programs on Windows have.
> Save it as UTF-8, or convert it: iconv -f windows-1252 -t utf-8 OLD > NEW.

Q204 A damaged gzip or Parquet file
The file is cut off, or is not what its name says.
> Fetch or pack it again. A plain file must not end in .gz.

Q205 JSON in another form than the name says
A .json file holds one list of records; a .jsonl file holds one record a line.
> Rename the file, as the message says, or mend the JSON at the place that it gives.

Q206 Records that cannot be used
Records lack a key, have values of another type, no answer, or lines that are no JSON. The first ones are listed by
line.
> Mend or remove these records; `qtune data FILE` checks a file without a model. Columns of other names are told by
data.columns.

Q207 No records
The file is empty, or holds blank lines only.
> Give another file.

Q208 A table with an unusable header
The first line of a CSV or TSV file names its columns, each once.
> Rename a column.

Q209 A folder without text files
A folder as data is read as text files, or as a dataset saved by the library datasets.
> Name the files themselves in data.train, as a list.

Q210 A dataset that cannot be loaded
The name is none, the split is not there, or the library datasets could not read or fetch it.
> Give hf:owner/name:split, and fetch it once where there is a network; without one it is taken from the local cache.

Q211 Messages, but no chat template
The data holds conversations, and the tokenizer of the model does not say how to write them: it is a base model.
> Set data.template to the template of the model's family (a file, or the text itself), take the instruct version of the
model, or give prompt/completion records.

Q212 The chat template refuses a conversation
The template raised an error of its own: many demand that user and assistant alternate, or know no system role.
> Change the records named, or set data.template.

Q213 Answers that cannot be told from the rest
The template writes an answer differently inside a conversation than at its end, so that its tokens cannot be found.
> Set data.loss_on: all, give a data.template with {% generation %} marks, or split the conversation.

Q214 data.template is no template
The value holds no {{, and is no readable file.
> Give the path of a template file, or the template itself.

Q215 Nothing is left beside the split
data.split holds records out, and too few different records are there for both parts.
> Give more records, a smaller data.split, or a file of its own as data.eval.

Q216 Examples longer than data.max_length
data.too_long says refuse; or every example would be dropped, or would lose its answer when cut.
> Raise data.max_length (`qtune data FILE` shows the lengths), or set data.too_long to cut or drop.

Q217 An example longer than train.micro_tokens
A micro-batch of so many tokens has no place for the longest example.
> Raise train.micro_tokens, or lower data.max_length.

Q218 data.system has no place
The records are not conversations, so that no system prompt can be put in front.
> Set data.system to null, or write it into the records.

Q219 A tokenizer that cannot mark beginning or end
Training needs to know which token ends a text, and which ones open it.
> Set eos_token in tokenizer_config.json of the model's folder.

Q220 Damaged tokens in the cache
What was kept of a tokenized file is not what was written. It is told in a note, and the file is tokenized anew.
> Nothing needs to be done.

Q221 Too little calibration text
A start or a choice of codes works on text, and there is less of it than one window, or too little reaches a layer.
> Give more text as calibrate.data, a smaller calibrate.length, or leave experts out of adapter.targets.

Q222 Tokens that the model does not have
A token id lies beyond the vocabulary of the model: tokenizer and model do not belong together.
> Take both from one place; after adding tokens the embedding must have been enlarged.

Q223 Tokens that cannot have rows of their own
A token of the section tokens is there already, is none of the tokenizer, stands twice or is split by it.
> Change the token named: tokens.add takes new ones, tokens.train those that the tokenizer has.

= Q3: models

Q301 No such model
There is no file or folder of that name, and it could not be fetched from the hub nor found in the local cache.
> Check the path or the hub id (owner/name). Gated models need `hf auth login`; without a network they must be in the
cache.

Q302 Not a checkpoint
A checkpoint is a folder with config.json and safetensors files, or one .gguf file.
> Give the folder that holds config.json. Files in pickle form (.bin, .pt) are not read: save them as safetensors.

Q303 An architecture that transformers here does not know
config.json, or the header of a GGUF file, names an architecture or values that the installed transformers refuses.
> Update transformers; for GGUF take the original checkpoint.

Q304 A damaged safetensors file
The file is cut off, its header is no header, or tensors do not lie where it says.
> Fetch the file again; compare its size with that on the hub.

Q305 A checkpoint that does not fit its configuration
Tensors are missing, are there twice, or have other shapes or types than config.json asks for.
> Fetch the folder again as a whole. After edits of config.json, undo them.

Q306 Damaged packed weights
A packed weight (of bitsandbytes, or of `qtune quantize`) lacks parts, or has parts of another form.
> Fetch the checkpoint again, or pack the original anew with `qtune quantize`.

Q307 A checkpoint that changed while it was read
The file was written to, or removed, in the middle.
> Wait until the download or the copy is done, and start again.

Q308 A tokenizer that cannot be read
tokenizer.json, tokenizer_config.json or the files beside them are missing, damaged, or need another package.
> Fetch the files of the tokenizer again; the message gives the reason of transformers.

Q309 A damaged GGUF file
The file is no GGUF, is cut off, or is of another version.
> Fetch it again. Versions 2 and 3, little-endian, are readable.

Q310 A GGUF type that is not known
The package gguf does not know how to read the type of a tensor.
> Update it: pip install -U gguf. Or take a file of another quantization.

Q311 Weights that cannot be packed
A weight holds NaN or infinite values, values beyond the scheme's range, or has a type that the scheme does not take.
> If the checkpoint is damaged, fetch it again. Otherwise take another scheme, or leave the layer dense.

Q312 A part of the architecture that cannot be packed
The model's embedding or head is no plain one.
> Leave scheme.embeddings unset.

Q313 Weights that are packed already
A start or a choice of codes works on the weights before they are packed, and the checkpoint holds them packed.
> Take the original checkpoint, or a start and codes that need no weights (adapter.method lora, calibrate.codes
nearest).

Q314 A vocabulary that takes no new tokens
The architecture does more with its input table or its head than reading a row and one product, or the model lacks rows
that its tokenizer names.
> Leave `tokens` out; the message says what is in the way.

= Q4: adapters and runs

Q401 Not a run
A folder of a run holds recipe.yaml and what training wrote beside it.
> Give the `output` folder of a `qtune train`.

Q402 adapter.json cannot be used
The file is missing, damaged, or of a version that this qtune does not read.
> Put the file back from a copy, or take a checkpoint of the run (RUN/checkpoints); for a newer format update qtune.

Q403 Damaged adapter weights
The tensors beside adapter.json are not those that it was written for: cut off, changed, or of another save.
> Put both files back from a copy, or go on from the last checkpoint: `qtune train RUN --resume`.

Q404 An adapter that does not fit this model
Its layers are not there, have other shapes, or hold other weights or another scheme than those it was trained on.
> Load it onto the base and the scheme in the recipe of its run.

Q405 An adapter where none belongs, or none where one is needed
The model in memory carries an adapter already, or carries none.
> Load the base again, or adapt it first.

Q406 The base of a run is gone
The model in the run's recipe is no longer where it was.
> Put it back, or set `model` in recipe.yaml of the run to where it lies now.

Q407 The codes of a base are gone
The start of this run changed the base, and the file that keeps that is missing.
> Put base.safetensors back from a copy, or train again.

Q408 Damaged checkpoints of a run
No checkpoint of the run is whole, or the one that was asked for is damaged.
> With an older one in RUN/checkpoints, remove the damaged one; otherwise start again with --overwrite.

Q409 A run that cannot be gone on with as asked
The checkpoint is of another recipe, base, scheme, data or version.
> Undo the changes that the message lists, or start a new run with another output, from these weights: --from RUN.

Q410 A folder that holds a run already
Training would replace a run, or start from itself.
> Choose another output=FOLDER, go on with the run (--resume), or replace it (--overwrite).

Q411 Damaged files of a run
recipe.yaml or metrics.jsonl of a run cannot be read, or adapter.json and they do not fit together.
> Put the file back from a copy. The weights are not touched by this.

Q412 A run without a row
Nothing was logged yet, so there is nothing to show.
> Wait for the first step.

Q413 A run without checkpoints
The run was made with train.save 0, or its checkpoints were removed, so it cannot be gone on with exactly.
> Start a new run from its weights: --from RUN and another output.

Q414 A start from another adapter or base
--from takes weights of a run, and the recipe's adapter or base is another one.
> Give the recipe the same adapter and scheme sections as the run has.

Q415 A folder in which a run is under way
Another process of qtune trains into this folder.
> Wait for its end, stop it, or choose another output=FOLDER.

Q416 A chain of tasks that is full
O-LoRA carries what earlier tasks learned at a rank of at most adapter.carry, and one more task would not fit.
> Merge the run and begin a new chain on the merged model, or begin the chain anew with a larger adapter.carry.

Q417 A PEFT adapter that cannot be read
The folder lacks adapter_config.json or adapter_model.safetensors, one of them is damaged, a value is of another type
than PEFT writes, or the weights are NaN. Pickle files are never opened.
> Save the adapter again with a current PEFT: model.save_pretrained(FOLDER).

Q418 A PEFT adapter that qtune has no form for
Its method, or a setting that changes what it computes (whole modules saved beside it, trained biases, a start that
changed the base), cannot be expressed here, and leaving it out would be another adapter.
> Merge it in PEFT (merge_and_unload) and take the result as the base, or train again without what the message names.

Q419 Runs that do not go together
Runs can be combined or compared weight by weight where they stand on the same packed base and began from the same
values; rows of tokens can come from one of them only, and what changes a bias is no change of a weight.
> Take runs of one base, scheme and start. Runs from starts that differ: train them with one train.seed and one
calibrate.data, or with lora. Merge a run by itself where it fits no other.

Q420 Adapters that cannot be used together as asked
Several adapters are loaded, and what was asked for needs what one of them, or the batch, does not have: an adapter for
each sample, parts of rank one, the tokenizer of all.
> The message says what is legal there: one mixture for all samples, whole adapters, or one adapter alone.

Q421 A change that no weight holds
The adapter decides for each token what it adds, so that there is no weight that does the same: it cannot be merged,
combined, inspected or written as a LoRA.
> Use the run itself: qtune chat and qtune eval take it. For a checkpoint, train with a method that merges, as olora_cl.

Q430 A dropout that this architecture does not allow
The model computes its attention by itself, so that no key can be left out, or its layers have no MLP that qtune knows,
or they do more to what goes in than to add to it, so that no gradient can go by them.
> Set the key that the message names to 0; adapter.dropout works with every model.
"""
