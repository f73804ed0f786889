/* --------------------------------------------------------------------------------------
   >>api-bytes   Text views, and immutable ref-counted bytes                               */

/* A view of text that the struct does not own. The text has no terminator and may hold any byte. */
typedef struct vkp_str {
    const char *ptr; /* the first byte; NULL: no text */
    size_t len;      /* bytes */
} vkp_str;

/* The two arguments of printf's %.*s for a vkp_str of at most INT_MAX bytes. */
#define VKP_FMT(s) (int)(s).len, (s).ptr

/* A view of a terminated string; NULL gives an empty text whose ptr is NULL. Any thread. */
VKP_API vkp_str vkp_str_of(const char *text);

/* A span of an immutable block. The struct holds ONE reference to the block, if block is not NULL;
   an assignment of the struct does not add a reference.                                       */
typedef struct vkp_bytes {
    const uint8_t *data; /* the first byte */
    size_t len;          /* bytes */
    vkp_block *block;    /* the block that data lies in; NULL: static bytes, a view, or empty */
} vkp_bytes;

/* Copy len bytes into a new block. NULL env: all defaults. NULL data is allowed with len 0.
   Owns:   borrows data; gives *out       Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (out NULL, data NULL with len > 0, len above 4 GiB - 1)              */
VKP_API VKP_NODISCARD vkp_status vkp_bytes_copy(const vkp_env *env, const void *data, size_t len,
                                                vkp_bytes *out);

/* A view of bytes that are never freed, such as a string literal: no block, no reference. Any
   thread.                                                                                     */
VKP_API vkp_bytes vkp_bytes_static(const void *data, size_t len);

/* One more reference to the bytes (gives). Static bytes have no count. Any thread. */
VKP_API vkp_bytes vkp_bytes_ref(const vkp_bytes *bytes);

/* A part of the bytes with a reference of its own (gives). offset and len are clamped to the length
   of the bytes. Any thread.                                                                   */
VKP_API vkp_bytes vkp_bytes_slice(const vkp_bytes *bytes, size_t offset, size_t len);

/* Give the reference back and empty the struct; the last reference frees the block. NULL and an
   empty struct are ignored. Any thread.                                                       */
VKP_API void vkp_bytes_unref(vkp_bytes *bytes);
