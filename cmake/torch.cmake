# LibTorch from .venv as one imported target. torch's own find_package wants a GPU and a full
# toolkit; headers, libraries and an rpath are all that is needed.
file(GLOB venv_site ${CMAKE_SOURCE_DIR}/.venv/lib/python3*/site-packages)
set(PARALLAX_TORCH_DIR "${venv_site}/torch" CACHE PATH "The torch package folder to build against")
if(NOT EXISTS ${PARALLAX_TORCH_DIR}/include/torch)
  message(FATAL_ERROR "No torch in ${PARALLAX_TORCH_DIR}: run tools/setup.sh, or set PARALLAX_TORCH_DIR")
endif()
add_library(torch INTERFACE)
target_include_directories(torch SYSTEM INTERFACE
  ${PARALLAX_TORCH_DIR}/include ${PARALLAX_TORCH_DIR}/include/torch/csrc/api/include)
file(GLOB venv_cuda_include ${PARALLAX_TORCH_DIR}/../nvidia/cu13/include)
if(venv_cuda_include)
  target_include_directories(torch SYSTEM INTERFACE ${venv_cuda_include})
endif()
target_link_directories(torch INTERFACE ${PARALLAX_TORCH_DIR}/lib)
target_link_libraries(torch INTERFACE torch torch_cpu c10)
if(EXISTS ${PARALLAX_TORCH_DIR}/lib/libtorch_cuda.so)
  target_link_libraries(torch INTERFACE torch_cuda c10_cuda)
  target_compile_definitions(torch INTERFACE PARALLAX_TORCH_CUDA)
endif()
target_link_options(torch INTERFACE -Wl,-rpath,${PARALLAX_TORCH_DIR}/lib)

# torch/torch.h costs 19 s a file; precompiled once, every torch target reuses it.
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/torch_pch.cc CONTENT "// Holds the precompiled header.\n")
add_library(torch_pch OBJECT ${CMAKE_BINARY_DIR}/torch_pch.cc)
target_link_libraries(torch_pch PRIVATE torch)
target_precompile_headers(torch_pch PRIVATE <torch/torch.h>)

# parallax_uses_torch(TARGET): links LibTorch and takes the shared precompiled header.
function(parallax_uses_torch target)
  target_link_libraries(${target} PUBLIC torch)
  target_precompile_headers(${target} REUSE_FROM torch_pch)
endfunction()
