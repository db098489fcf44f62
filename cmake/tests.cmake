find_package(GTest REQUIRED)

# parallax_add_tests(ROOM LIBRARIES...): every *_test.cc of the current folder becomes a program
# of its own (build/tests/ROOM/STEM) and one ctest entry (ROOM/STEM). Other .cc files of the folder
# are shared by all of them. Files that need the CUDA runtime have cuda in their name.
function(parallax_add_tests room)
  file(GLOB tests CONFIGURE_DEPENDS *_test.cc)
  file(GLOB shared CONFIGURE_DEPENDS *.cc)
  list(REMOVE_ITEM shared ${tests})
  if(NOT PARALLAX_CUDA)
    list(FILTER tests EXCLUDE REGEX "cuda[a-z_]*[.]cc$")
    list(FILTER shared EXCLUDE REGEX "cuda[a-z_]*[.]cc$")
  endif()
  foreach(source ${tests})
    get_filename_component(stem ${source} NAME_WE)
    add_executable(${room}_${stem} ${source} ${shared})
    set_target_properties(${room}_${stem} PROPERTIES OUTPUT_NAME ${stem}
                          RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests/${room})
    target_include_directories(${room}_${stem} PRIVATE ${CMAKE_SOURCE_DIR}
                               ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    target_link_libraries(${room}_${stem} PRIVATE ${ARGN} GTest::gtest GTest::gmock GTest::gtest_main)
    if(TARGET torch AND NOT room STREQUAL kernels)
      parallax_uses_torch(${room}_${stem})
    endif()
    add_test(NAME ${room}/${stem} COMMAND ${room}_${stem} WORKING_DIRECTORY ${CMAKE_SOURCE_DIR})
    if(stem MATCHES "cuda")
      # Without a GPU such a test is reported as skipped, not as passed.
      set_tests_properties(${room}/${stem} PROPERTIES SKIP_REGULAR_EXPRESSION "[[]  SKIPPED []]")
    endif()
    if(stem MATCHES "_long_test$")
      set_tests_properties(${room}/${stem} PROPERTIES LABELS long)  # `make test-all` alone
    endif()
    # Tests share the cores; threads that spin while they wait would take them from each other.
    set_tests_properties(${room}/${stem} PROPERTIES ENVIRONMENT OMP_WAIT_POLICY=passive)
  endforeach()
endfunction()
