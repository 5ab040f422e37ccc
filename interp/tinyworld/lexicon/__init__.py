"""The words of tinyworld, as plain data.

One module per part of the vocabulary. Adding a word, a fact or a topic is one line in one of them; the tokenizer
and the tests follow. A word holds no whitespace, is one token, and is written as it is read (names are capitalised,
sentences are not).
"""
