// Makes DALI allocate host memory from a pool. Takes effect when the plugin is loaded.
//
// By default, DALI allocates the buffers of every batch with malloc and frees them after the batch. Each output is
// several megabytes, so glibc returns the pages to the kernel and every batch takes its page faults again. At block = 2
// they cost as much as the transform. DALI pools GPU memory; this uses the same pool class for host memory.

#include "dali/core/mm/default_resources.h"
#include "dali/core/mm/detail/free_list.h"
#include "dali/core/mm/malloc_resource.h"
#include "dali/core/mm/pool_resource.h"
#include "dali/core/spinlock.h"

namespace bandsplit {

namespace {

namespace mm = ::dali::mm;

bool PoolHostMemory() {
  mm::pool_options options = mm::default_host_pool_opts();
  options.min_block_size = 64 << 20;  // size of each malloc; pages that are never touched take no memory
  options.growth_factor = 1;
  // Never deleted, because buffers may outlive static objects.
  static auto *pool = new mm::pool_resource<mm::memory_kind::host, mm::coalescing_free_tree, ::dali::spinlock>(
      &mm::malloc_memory_resource::instance(), options);
  mm::SetDefaultResource<mm::memory_kind::host>(pool);
  return true;
}

#ifndef __SANITIZE_ADDRESS__  // AddressSanitizer checks malloc's blocks only; a pool would hide errors
const bool host_memory_is_pooled = PoolHostMemory();
#endif

}  // namespace

}  // namespace bandsplit
