/* --------------------------------------------------------------------------------------
   >>api-bytes   Text views, and immutable ref-counted bytes                               */

/* Borrowed text: not terminated, may hold any byte. */
typedef struct vkp_str {
    const char *ptr;
    size_t len; /* bytes */
} vkp_str;

/* Arguments of printf's %.*s for a vkp_str (texts above INT_MAX bytes are cut by printf). */
#define VKP_FMT(s) (int)(s).len, (s).ptr

/* A view of a terminated string; NULL gives the empty text. Any thread. */
VKP_API vkp_str vkp_str_of(const char *text);

/* A slice of an immutable block. The value holds ONE reference when block is not NULL; copying
   the struct does not copy the reference. Block NULL: static bytes, or empty.                 */
typedef struct vkp_bytes {
    const uint8_t *data;
    size_t len;
    vkp_block *block;
} vkp_bytes;

/* Copy len bytes into a new block.
   Owns:   borrows data; gives *out       Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (out NULL, or data NULL with len > 0, or len above 4 GiB - 1)        */
VKP_API VKP_NODISCARD vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len,
                                                vkp_bytes *out);

/* Bytes that outlive everything (string literals): no block, no count. Any thread. */
VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len);

/* One more reference to the same bytes (gives). Any thread. */
VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes);

/* A part of the bytes, with its own reference (gives); clamped to what is there. Any thread. */
VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len);

/* Give the reference back and empty the value; the last one frees the block. NULL and an empty
   value are ignored. Any thread.                                                              */
VKP_API void vkp_bytes_unref(vkp_bytes *bytes);
