// SPDX-License-Identifier: MIT
// Byte-level BPE as Hugging Face's `tokenizers` defines it in tokenizer.json: optional NFC, added
// tokens cut out of the text, a split by regular expressions, bytes written in a printable
// alphabet, merges by rank. Supported: normalizer null or NFC; pre-tokenizers Split (Regex or
// String, Isolated) and ByteLevel, alone or in a Sequence; model BPE without dropout, prefixes or
// byte fallback.
#pragma once

#include <memory>
#include <string>

#include "lm/tokenizer.h"

namespace parallax::lm {

std::shared_ptr<const Tokenizer> parse_bpe_tokenizer(std::string definition,
                                                     const std::string& name);

}  // namespace parallax::lm
