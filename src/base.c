/* ======================================================================================
   >>impl-base   Atomics by intent, locks, memory, log
   ======================================================================================
   All atomics of the file use the macros below, so that a model checker can replace them
   (VKP_I_ATOMICS_FILE). A name without a suffix is relaxed for a load, a store, ADD and SUB, and
   acquire and release for XCHG, CAS, OR and AND. No macro is a fence: ThreadSanitizer does not see
   fences. Where a store must be visible before a later load of another variable, both sides use
   the SEQ forms, or a flag (vkp_i_flag_*, section park).
   Reference counts grow relaxed and shrink with acquire and release, so that the thread that frees
   an object sees all writes to it. The functions of this section take no lock.                 */
#ifdef VKP_I_ATOMICS_FILE
#include VKP_I_ATOMICS_FILE
#else
#define VKP_I_LOAD(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define VKP_I_LOAD_ACQ(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define VKP_I_LOAD_SEQ(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define VKP_I_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define VKP_I_STORE_REL(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define VKP_I_STORE_SEQ(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define VKP_I_XCHG(p, v) __atomic_exchange_n((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_XCHG_SEQ(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
#define VKP_I_CAS(p, expected, v) \
    __atomic_compare_exchange_n((p), (expected), (v), false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)
#define VKP_I_CAS_SEQ(p, expected, v) \
    __atomic_compare_exchange_n((p), (expected), (v), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define VKP_I_ADD(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
#define VKP_I_SUB(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_RELAXED)
#define VKP_I_UNREF(p) __atomic_fetch_sub((p), 1, __ATOMIC_ACQ_REL) /* gives the count before */
#define VKP_I_SUB_ACQ_REL(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_ADD_ACQ_REL(p, v) __atomic_fetch_add((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_OR(p, v) __atomic_fetch_or((p), (v), __ATOMIC_ACQ_REL)
#define VKP_I_AND(p, v) __atomic_fetch_and((p), (v), __ATOMIC_ACQ_REL)
/* The calling thread as a number; never 0 or 1. The builtin exists for x86-64 from clang 14 and
   gcc 11 on.                                                                                   */
#if VKP_I_LINUX && defined(__x86_64__) && \
    (defined(__clang__) ? __clang_major__ >= 14 : __GNUC__ >= 11)
#define VKP_I_SELF() ((uintptr_t)__builtin_thread_pointer())
#else
#define VKP_I_SELF() ((uintptr_t)pthread_self())
#endif
/* Orders memory accesses for the compiler only: no instruction. */
#define VKP_I_ORDER() __atomic_signal_fence(__ATOMIC_SEQ_CST)
#if defined(__x86_64__) || defined(__i386__)
#define VKP_I_PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__) || defined(__arm__)
#define VKP_I_PAUSE() __asm__ volatile("yield")
#else
#define VKP_I_PAUSE() VKP_I_ORDER()
#endif
/* A value that one thread hands to another is copied in and out: a model checker sees the
   copies.                                                                                      */
#define VKP_I_COPY_IN(slot, from, bytes) vkp_i_copy_in((slot), (from), (bytes))
#define VKP_I_COPY_OUT(to, slot, bytes) vkp_i_copy_out((to), (slot), (bytes))
#define VKP_I_MUTEX pthread_mutex_t
#define VKP_I_MUTEX_INIT(m) ((void)pthread_mutex_init((m), NULL))
#define VKP_I_MUTEX_DEINIT(m) ((void)pthread_mutex_destroy((m)))
#define VKP_I_LOCK(m) ((void)pthread_mutex_lock((m)))
#define VKP_I_UNLOCK(m) ((void)pthread_mutex_unlock((m)))
#endif

#ifndef VKP_ASSERT
#define VKP_ASSERT(condition) ((void)0)
#endif

/* A programmer's error: assert where the program defines VKP_ASSERT, and return INVALID. */
#define VKP_I_REQUIRE(condition)    \
    do {                            \
        if (!(condition)) {         \
            VKP_ASSERT(condition);  \
            return VKP_ERR_INVALID; \
        }                           \
    } while (0)

/* Fields that are this many bytes apart lie in different cache lines and different pairs of
   lines.                                                                                       */
#define VKP_I_APART 128

/* Most bytes of one value of a channel (mpsc, broadcast, watch). */
#define VKP_I_ELEM_MAX 65536u

#define VKP_I_NS_PER_MS 1000000u

#define VKP_I_MIN(a, b) ((a) < (b) ? (a) : (b))
#define VKP_I_MAX(a, b) ((a) > (b) ? (a) : (b))

/* The compiler no longer knows what the pointer points to. Where it does, GCC warns of overflows in
   branches that are dead code for the size at hand, at link time (-flto) too. Of a copy, hide the
   pointer to the caller's object alone: the bench channels shows what another one costs.      */
#define VKP_I_HIDE(pointer) __asm__("" : "+r"(pointer))

/* Copy a value. Values of usual sizes (8, 24, 64 bytes) move without a call of memcpy. */
static inline void vkp_i_copy(void *to, const void *from, size_t bytes)
{
    if (bytes == 8) {
        memcpy(to, from, 8);
    } else if (bytes == 24) {
        memcpy(to, from, 24);
    } else if (bytes == 64) {
        memcpy(to, from, 64);
    } else {
        memcpy(to, from, bytes);
    }
}

/* Copy the caller's value into a slot. */
static inline void vkp_i_copy_in(void *slot, const void *from, size_t bytes)
{
    VKP_I_HIDE(from);
    vkp_i_copy(slot, from, bytes);
}

/* Copy a slot's value to the caller. */
static inline void vkp_i_copy_out(void *to, const void *slot, size_t bytes)
{
    VKP_I_HIDE(to);
    vkp_i_copy(to, slot, bytes);
}

VKP_API const char *vkp_status_str(vkp_status status)
{
#define VKP_I_STATUS_TEXT(name, value, text) \
    if (status == (name)) {                  \
        return text;                         \
    }
    VKP_STATUS_MAP(VKP_I_STATUS_TEXT)
#undef VKP_I_STATUS_TEXT
    return "unknown status";
}

VKP_API const char *vkp_version_str(void)
{
    return VKP_VERSION_STR;
}

/* The default allocator. Not inlined: gcc would warn (-Wfree-nonheap-object) of frees of
   embedded slots and lanes, which a check at run time prevents.                                */
static __attribute__((noinline)) void *vkp_i_libc_alloc(void *user, void *ptr, size_t old_bytes,
                                                        size_t new_bytes)
{
    (void)user;
    (void)old_bytes;
    if (new_bytes == 0) {
        free(ptr);
        return NULL;
    }
    return realloc(ptr, new_bytes);
}

static const vkp_env vkp_i_env_default = {NULL, NULL, NULL, VKP_LOG_DEFAULT, NULL, 0};

/* The given env, or the default one for NULL. */
static const vkp_env *vkp_i_env(const vkp_env *env)
{
    return env != NULL ? env : &vkp_i_env_default;
}

/* Allocate, resize or free with the allocator of the env, as vkp_env.alloc describes. */
static void *vkp_i_resize(const vkp_env *env, void *ptr, size_t old_bytes, size_t new_bytes)
{
    return env->alloc != NULL ? env->alloc(env->user, ptr, old_bytes, new_bytes)
                              : vkp_i_libc_alloc(NULL, ptr, old_bytes, new_bytes);
}

static void *vkp_i_alloc(const vkp_env *env, size_t bytes)
{
    return vkp_i_resize(env, NULL, 0, bytes);
}

static void *vkp_i_alloc_zero(const vkp_env *env, size_t bytes)
{
    void *ptr = vkp_i_alloc(env, bytes);
    if (ptr != NULL) {
        memset(ptr, 0, bytes);
    }
    return ptr;
}

/* Free memory of `bytes` bytes; NULL is ignored. */
static void vkp_i_free(const vkp_env *env, void *ptr, size_t bytes)
{
    if (ptr != NULL) {
        (void)vkp_i_resize(env, ptr, bytes, 0);
    }
}

#if VKP_I_IO
#define VKP_I_GROW_FIRST 8u /* elements of an array that grows for the first time */

/* Make room for `need` elements in an array that doubles; false when memory runs out or the size
   overflows, and the array is unchanged then.                                                  */
static bool vkp_i_grow(const vkp_env *env, void **array, size_t *capacity, size_t need,
                       size_t elem_bytes)
{
    size_t wanted = *capacity < VKP_I_GROW_FIRST ? VKP_I_GROW_FIRST : *capacity;
    void *grown;
    if (need <= *capacity) {
        return true;
    }
    while (wanted < need) {
        if (wanted > SIZE_MAX / 2) {
            return false;
        }
        wanted *= 2;
    }
    if (wanted > SIZE_MAX / elem_bytes) {
        return false;
    }
    grown = vkp_i_resize(env, *array, *capacity * elem_bytes, wanted * elem_bytes);
    if (grown == NULL) {
        return false;
    }
    *array = grown;
    *capacity = wanted;
    return true;
}

#define VKP_I_LOG_BYTES 512 /* of one log line with its NUL; a longer line is cut */

/* Whether a control character of C1 begins here, in UTF-8. */
static bool vkp_i_is_c1(const char *text)
{
    return (unsigned char)text[0] == 0xc2 && (unsigned char)text[1] >= 0x80 &&
           (unsigned char)text[1] < 0xa0;
}

/* Copy text with each control character as \xNN, so that nobody's name makes a line of its own or
   moves a terminal's cursor; what size has no room for is left out. */
static void vkp_i_escape(char *out, size_t size, const char *text)
{
    size_t used = 0;
    size_t i;
    for (i = 0; text[i] != '\0'; i++) {
        unsigned byte = (unsigned char)text[i];
        bool plain = byte >= 0x20 && byte != 0x7f && !vkp_i_is_c1(text + i) &&
                     !(i > 0 && vkp_i_is_c1(text + i - 1));
        if (used + (plain ? 1u : 4u) >= size) {
            break;
        }
        if (plain) {
            out[used++] = text[i];
        } else {
            used += (size_t)snprintf(out + used, size - used, "\\x%02x", byte);
        }
    }
    out[used] = '\0';
}

/* Format one line and give it to the log of the env, if the env logs this level. Call it without
   a lock.                                                                                      */
__attribute__((format(printf, 3, 4))) static void vkp_i_log(const vkp_env *env, vkp_log_level level,
                                                            const char *format, ...)
{
    char text[VKP_I_LOG_BYTES];
    char escaped[VKP_I_LOG_BYTES];
    va_list arguments;
    int most = env->log_level == VKP_LOG_DEFAULT ? (int)VKP_LOG_WARN : (int)env->log_level;
    if (env->log == NULL || (int)level > most) {
        return;
    }
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    vkp_i_escape(escaped, sizeof escaped, text);
    env->log(env->user, level, escaped);
}
#endif

/* The deadline `ms` milliseconds after now_ns; saturates at VKP_FOREVER. */
static uint64_t vkp_i_after_ms(uint64_t now_ns, uint64_t ms)
{
    return ms > (VKP_FOREVER - now_ns) / VKP_I_NS_PER_MS ? VKP_FOREVER
                                                         : now_ns + ms * VKP_I_NS_PER_MS;
}

VKP_API vkp_str vkp_str_of(const char *text)
{
    vkp_str view;
    view.ptr = text;
    view.len = text != NULL ? strlen(text) : 0;
    return view;
}

#if VKP_I_IO
/* A view of `len` characters; borrows them. */
static vkp_str vkp_i_str(const void *ptr, size_t len)
{
    vkp_str view;
    view.ptr = (const char *)ptr;
    view.len = len;
    return view;
}

static bool vkp_i_str_equal(vkp_str a, vkp_str b)
{
    return a.len == b.len && (a.len == 0 || memcmp(a.ptr, b.ptr, a.len) == 0);
}

/* The lower-case letter of an ASCII capital; other characters are unchanged. */
static char vkp_i_lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c + ('a' - 'A')) : c;
}

/* Whether two views are equal without regard to ASCII case. */
static bool vkp_i_str_alike(vkp_str a, vkp_str b)
{
    size_t i;
    for (i = 0; i < a.len && i < b.len; i++) {
        if (vkp_i_lower(a.ptr[i]) != vkp_i_lower(b.ptr[i])) {
            return false;
        }
    }
    return a.len == b.len;
}

/* Whether the view equals the terminated text without regard to ASCII case. */
static bool vkp_i_str_is(vkp_str view, const char *text)
{
    size_t i;
    for (i = 0; i < view.len; i++) {
        if (text[i] == '\0' || vkp_i_lower(view.ptr[i]) != vkp_i_lower(text[i])) {
            return false;
        }
    }
    return text[i] == '\0';
}

/* Replace the view by a copy that has a NUL behind its end; false without memory. A view whose
   ptr is NULL stays. vkp_i_free_str frees the copy.                                            */
static bool vkp_i_copy_str(const vkp_env *env, vkp_str *text)
{
    char *copy;
    if (text->ptr == NULL) {
        return true;
    }
    copy = (char *)vkp_i_alloc(env, text->len + 1);
    if (copy != NULL) {
        memcpy(copy, text->ptr, text->len);
        copy[text->len] = '\0';
    }
    text->ptr = copy;
    return copy != NULL;
}

/* Free a copy that vkp_i_copy_str made; a view whose ptr is NULL is ignored. */
static void vkp_i_free_str(const vkp_env *env, vkp_str text)
{
    void *copy;
    memcpy(&copy, &text.ptr, sizeof copy); /* a cast would warn: the copy itself is not const */
    vkp_i_free(env, copy, text.len + 1);
}

/* Free a text whose allocation ends with its only NUL; NULL is ignored. */
static void vkp_i_free_text(const vkp_env *env, char *text)
{
    if (text != NULL) {
        vkp_i_free(env, text, strlen(text) + 1);
    }
}

/* Whether the text has the terminated part in it. */
static bool vkp_i_contains(vkp_str text, const char *part)
{
    size_t len = strlen(part);
    size_t i;
    for (i = 0; i + len <= text.len; i++) {
        if (memcmp(text.ptr + i, part, len) == 0) {
            return true;
        }
    }
    return false;
}

static bool vkp_i_starts_with(vkp_str text, const char *start)
{
    size_t len = strlen(start);
    return text.len >= len && memcmp(text.ptr, start, len) == 0;
}

/* Load 8 bytes in the byte order of the machine, from an address of any alignment. */
static uint64_t vkp_i_load64(const void *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* The status of a failed system call, whose result is a negated errno; sets errno. */
static vkp_status vkp_i_sys_failure(int result)
{
    errno = -result;
    return result == -ENOMEM || result == -ENOBUFS ? VKP_ERR_NOMEM : VKP_ERR_SYS;
}
#endif
