"""From sources to token ids: what the stages train on.

In reading order:

- ``strict_json``: JSON Lines and JSON lists in which every mistake has a line and a field
- ``row_files``: files of rows, packed or not, read as what their names say they are
- ``sources``: rows and documents from local files, folders and the Hugging Face Hub
- ``mixture``: the documents of several sources, by weights
- ``rows``: the shapes of instruction and preference rows that are understood, and their checks
- ``village``: the demo's own small world
- ``decontamination``: evaluation items found in what would be trained on
- ``quality``, ``personal``: Unicode repair, languages, quality filters; masks for personal data
- ``clean``: single documents repaired, cut, filtered and masked; their shards
- ``clean_counts``: what was read, kept, masked and dropped, by source
- ``duplicates``: exact and near-duplicates, and what is held out, decided over all documents
- ``cleaning``: all of that as tasks, one a shard
- ``tokenizer``: training a byte-level BPE, or taking over an existing tokenizer
- ``encoders``: two engines that give the same ids, and the proof that they do
- ``best_fit``: which document goes into which row
- ``token_files``: clean shards as ids, made by several processes and kept when stopped
- ``template_sandbox``: chat templates from outside, rendered where they can do no harm
- ``chat``: conversations to token ids and loss masks
- ``row_rules``: which rows and pairs are left out
- ``tables``: tokenised conversations and preference pairs as Hugging Face data sets
- ``saved_rows``: rows counted, split and saved
- ``token_rows``: numbered rows of the ids in files that are watched meanwhile
- ``shards``: packed token rows, written and read
- ``batches``: what each training step sees
- ``random_texts``: text of any size, for measurements
"""
