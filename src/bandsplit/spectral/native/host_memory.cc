// DALI's host memory from a pool, from the moment that the plugin is loaded.
//
// DALI takes the buffers of every batch from malloc and gives them back after it. A batch of bands is megabytes an
// output: glibc returns that to the system each time, and the next batch pays for every page again, which at block = 2
// costs as much as the transform. DALI has a pool for the memory of the GPU; this is the same pool for that of the host.

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
  options.min_block_size = 64 << 20;  // what it takes from malloc at once; pages never touched cost nothing
  options.growth_factor = 1;
  // Never deleted: buffers live on when static objects are destroyed.
  static auto *pool = new mm::pool_resource<mm::memory_kind::host, mm::coalescing_free_tree, ::dali::spinlock>(
      &mm::malloc_memory_resource::instance(), options);
  mm::SetDefaultResource<mm::memory_kind::host>(pool);
  return true;
}

#ifndef __SANITIZE_ADDRESS__  // which watches what comes from malloc
const bool host_memory_is_pooled = PoolHostMemory();
#endif

}  // namespace

}  // namespace bandsplit
