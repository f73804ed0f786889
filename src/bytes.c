/* ======================================================================================
   >>impl-bytes   Immutable ref-counted blocks
   ======================================================================================
   A block is one allocation: header, then bytes. Bytes below `len` never change. The ONE holder of
   the right to append (the read block of a loop, the encoder of a hub, a writer) writes above
   `len` and hands out ranges of the written bytes (vkp_bytes). Ranges reach other threads through
   queues, which order those writes before the reads. No locks: the last unref frees the block. */

struct vkp_block {
    const vkp_env *env; /* its allocator frees the block */
    size_t refs;        /* atomic; 64 bits do not overflow */
    size_t capacity;    /* bytes behind the header */
    size_t len;         /* bytes in use; only the holder of the right to append changes it */
};

#define VKP_I_BLOCK_MAX 0xffffffffu /* most bytes of a block: offsets inside have 32 bits */
#define VKP_I_BLOCK_MIN 64u         /* fewest bytes of a block that vkp_i_block_reserve opens */

/* The bytes of the block, behind its header. */
static uint8_t *vkp_i_block_data(vkp_block *block)
{
    return (uint8_t *)(block + 1);
}

/* An empty block with one reference; NULL without memory, or above VKP_I_BLOCK_MAX. */
static vkp_block *vkp_i_block_open(const vkp_env *env, size_t capacity)
{
    vkp_block *block;
    if (capacity > VKP_I_BLOCK_MAX) {
        return NULL;
    }
    block = (vkp_block *)vkp_i_alloc(env, sizeof *block + capacity);
    if (block != NULL) {
        block->env = env;
        block->refs = 1;
        block->capacity = capacity;
        block->len = 0;
    }
    return block;
}

/* One more reference; NULL is ignored. */
static vkp_block *vkp_i_block_ref(vkp_block *block)
{
    if (block != NULL) {
        (void)VKP_I_ADD(&block->refs, 1);
    }
    return block;
}

/* One reference less; the last one frees the block. NULL is ignored. */
static void vkp_i_block_unref(vkp_block *block)
{
    if (block != NULL && VKP_I_UNREF(&block->refs) == 1) {
        vkp_i_free(block->env, block, sizeof *block + block->capacity);
    }
}

#if VKP_I_IO
/* Whether the reference of the caller is the only one, so that the bytes may be written again.
   The acquire pairs with the release in the unref of the other holders.                        */
static bool vkp_i_block_is_mine(const vkp_block *block)
{
    return VKP_I_LOAD_ACQ(&block->refs) == 1;
}

/* Make room for `more` bytes in an unshared block of the caller, by a move to a larger block
   (*block may be NULL). OK, NOMEM, or LIMIT above VKP_I_BLOCK_MAX.                             */
static vkp_status vkp_i_block_reserve(const vkp_env *env, vkp_block **block, size_t more)
{
    size_t used = *block != NULL ? (*block)->len : 0;
    size_t capacity = *block != NULL ? (*block)->capacity : 0;
    size_t wanted;
    vkp_block *grown;
    if (more <= capacity - used) {
        return VKP_OK;
    }
    if (more > VKP_I_BLOCK_MAX - used) {
        return VKP_ERR_LIMIT;
    }
    wanted = VKP_I_MAX(used + more, VKP_I_MIN(capacity * 2, (size_t)VKP_I_BLOCK_MAX));
    wanted = VKP_I_MAX(wanted, (size_t)VKP_I_BLOCK_MIN);
    grown = vkp_i_block_open(env, wanted);
    if (grown == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (used > 0) {
        memcpy(vkp_i_block_data(grown), vkp_i_block_data(*block), used);
    }
    grown->len = used;
    vkp_i_block_unref(*block);
    *block = grown;
    return VKP_OK;
}
#endif

VKP_API vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len, vkp_bytes *out)
{
    vkp_block *block;
    VKP_I_REQUIRE(out != NULL && (data != NULL || len == 0) && len <= VKP_I_BLOCK_MAX);
    block = vkp_i_block_open(vkp_i_env(env), len);
    if (block == NULL) {
        return VKP_ERR_NOMEM;
    }
    if (len > 0) {
        memcpy(vkp_i_block_data(block), data, len);
    }
    block->len = len;
    out->data = vkp_i_block_data(block);
    out->len = len;
    out->block = block;
    return VKP_OK;
}

VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len)
{
    vkp_bytes bytes;
    bytes.data = (const uint8_t *)data;
    bytes.len = len;
    bytes.block = NULL;
    return bytes;
}

VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes)
{
    (void)vkp_i_block_ref(bytes->block);
    return *bytes;
}

VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len)
{
    vkp_bytes slice = vkp_bytes_ref(bytes);
    offset = VKP_I_MIN(offset, bytes->len);
    slice.data = bytes->data != NULL ? bytes->data + offset : NULL;
    slice.len = VKP_I_MIN(len, bytes->len - offset);
    return slice;
}

VKP_API void vkp_bytes_unref(vkp_bytes *bytes)
{
    if (bytes != NULL) {
        vkp_i_block_unref(bytes->block);
        *bytes = vkp_bytes_static(NULL, 0);
    }
}
