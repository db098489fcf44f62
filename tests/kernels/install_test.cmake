# What an engine does: installs the library into a folder of its own, finds it with find_package, builds
# examples/decode against it and runs that. Called with SOURCE, BUILD, GENERATOR, MAKE_PROGRAM and COMPILER.
set(folder ${BUILD}/tests/install)
file(REMOVE_RECURSE ${folder})
function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " words)
    message(FATAL_ERROR "failed (${result}): ${words}")
  endif()
endfunction()
run(${CMAKE_COMMAND} --install ${BUILD} --prefix ${folder}/prefix)
run(${CMAKE_COMMAND} -S ${SOURCE}/examples/decode -B ${folder}/build -G ${GENERATOR}
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_PREFIX_PATH=${folder}/prefix
    -DCMAKE_CXX_COMPILER=${COMPILER} -DCMAKE_CXX_FLAGS=-Wall\ -Wextra\ -Werror)
run(${CMAKE_COMMAND} --build ${folder}/build)
run(${folder}/build/decode)
