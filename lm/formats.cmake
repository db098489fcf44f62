# parallax_formats: everything of this room that turns bytes from outside into values, without torch,
# so that it builds, is fuzzed and runs under sanitizers in seconds.
set(formats bpe.cc checksum.cc config.cc corpus.cc dataset.cc files.cc metrics.cc run_state.cc
    safetensors.cc sealed_json.cc shard.cc tensorboard.cc text_split.cc tokenizer.cc utf8.cc)
list(TRANSFORM formats PREPEND ${CMAKE_CURRENT_LIST_DIR}/)
# Static where the system has it: the binary then runs on a GPU machine that lacks both.
find_library(PARALLAX_PCRE2 NAMES libpcre2-8.a pcre2-8 REQUIRED)
find_library(PARALLAX_UTF8PROC NAMES libutf8proc.a utf8proc REQUIRED)
add_library(parallax_formats STATIC ${formats})
target_include_directories(parallax_formats PUBLIC ${CMAKE_SOURCE_DIR})
target_link_libraries(parallax_formats PUBLIC ${PARALLAX_PCRE2} ${PARALLAX_UTF8PROC})
