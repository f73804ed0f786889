#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-value   Values of RESP2 and RESP3
   Facts: the RESP3 specification (redis/redis-specifications, protocol/RESP3.md).            */

typedef enum vkp_resp_type {
    VKP_RESP_NULL = 0, /* _  and $-1, *-1 of RESP2: see VKP_VALUE_NULL_BULK */
    VKP_RESP_STRING,  /* $ + =  str, len; VKP_VALUE_SIMPLE and VKP_VALUE_VERBATIM tell them apart */
    VKP_RESP_ERROR,   /* - !  str, len */
    VKP_RESP_INTEGER, /* :  integer */
    VKP_RESP_DOUBLE,  /* ,  str, len: the digits; vkp_value_get_double converts */
    VKP_RESP_BOOL,    /* #  integer: 0 or 1 */
    VKP_RESP_BIGNUM,  /* (  str, len: the digits with their sign */
    VKP_RESP_ARRAY,   /* *  len elements */
    VKP_RESP_SET,     /* ~  len elements */
    VKP_RESP_PUSH,    /* >  len elements; the first is a string, the kind of the push */
    VKP_RESP_MAP,     /* %  len elements: key, value, key, value ... (twice the wire's count) */
    VKP_RESP_ATTRIBUTE /* |  as VKP_RESP_MAP; stands before the value that it annotates */
} vkp_resp_type;

#ifndef __cplusplus
/* In C an enumerator is an int, which compilers compare with any enum in silence. With these casts
   they warn when a type of RESP, a bit of readiness or a status is taken for another.         */
#define VKP_RESP_NULL ((vkp_resp_type)VKP_RESP_NULL)
#define VKP_RESP_STRING ((vkp_resp_type)VKP_RESP_STRING)
#define VKP_RESP_ERROR ((vkp_resp_type)VKP_RESP_ERROR)
#define VKP_RESP_INTEGER ((vkp_resp_type)VKP_RESP_INTEGER)
#define VKP_RESP_DOUBLE ((vkp_resp_type)VKP_RESP_DOUBLE)
#define VKP_RESP_BOOL ((vkp_resp_type)VKP_RESP_BOOL)
#define VKP_RESP_BIGNUM ((vkp_resp_type)VKP_RESP_BIGNUM)
#define VKP_RESP_ARRAY ((vkp_resp_type)VKP_RESP_ARRAY)
#define VKP_RESP_SET ((vkp_resp_type)VKP_RESP_SET)
#define VKP_RESP_PUSH ((vkp_resp_type)VKP_RESP_PUSH)
#define VKP_RESP_MAP ((vkp_resp_type)VKP_RESP_MAP)
#define VKP_RESP_ATTRIBUTE ((vkp_resp_type)VKP_RESP_ATTRIBUTE)
#endif

/* vkp_value.flags: bits. */
typedef enum vkp_value_flags {
    VKP_VALUE_SIMPLE = 1,     /* + or -: a line */
    VKP_VALUE_VERBATIM = 2,   /* =: str is past the four bytes "txt:" */
    VKP_VALUE_NULL_BULK = 4,  /* null came as $-1 */
    VKP_VALUE_NULL_ARRAY = 8, /* null came as *-1 */
    /* A message push inside another aggregate: servers before 7.2 put one into the array of an EXEC
       that publishes to its own connection. Not an element: counted by nobody, passed over by the
       walk.                                                                                    */
    VKP_VALUE_OUT_OF_BAND = 16
} vkp_value_flags;

/* One value of a tree. A tree is one array in reading order: the elements of an aggregate follow
   it, each with its own. Walk with vkp_value_get_first and vkp_value_get_next, never by index. */
typedef struct vkp_value {
    uint8_t type;  /* vkp_resp_type */
    uint8_t flags; /* VKP_F_* */
    uint16_t i_depth;
    uint32_t span;         /* places in the array that it takes, its elements included */
    uint32_t attributes;   /* places back to the VKP_RESP_ATTRIBUTE that annotates it; 0 = none */
    uint32_t i_has_nested; /* of an aggregate: it holds a VKP_VALUE_OUT_OF_BAND */
    size_t len;            /* bytes of str, or number of elements */
    union {
        const char *str; /* not terminated */
        int64_t integer;
        size_t i_offset;
    } u;
} vkp_value;

/* The first element of an aggregate, or NULL; then its next sibling, or NULL after the last.
   `parent` is the aggregate. Attributes are passed over. Any thread; views.                   */
VKP_API const vkp_value *vkp_value_get_first(const vkp_value *parent);
VKP_API const vkp_value *vkp_value_get_next(const vkp_value *parent, const vkp_value *value);

/* str and len of a STRING, ERROR, BIGNUM or DOUBLE; empty for everything else, NULL included.
   Views. Any thread.                                                                          */
VKP_API vkp_str vkp_value_get_str(const vkp_value *value);

/* The number of a DOUBLE or an INTEGER in any locale; 0 for the rest. Any thread. */
VKP_API double vkp_value_get_double(const vkp_value *value);

/* True for a STRING or ERROR that equals the terminated text, ASCII case ignored. Any thread. */
VKP_API bool vkp_value_is_text(const vkp_value *value, vkp_str text);

typedef struct vkp_resp_config {
    uint32_t max_depth;     /* nested aggregates; default 128, at most 65,000 */
    uint32_t max_elements;  /* elements of one aggregate on the wire; default 4,294,967,295 / 2 */
    size_t max_bulk_bytes;  /* one bulk string; default 512 MiB */
    size_t max_line_bytes;  /* one line, CRLF not counted; default 64 KiB */
    size_t max_frame_bytes; /* one whole frame; default 1 GiB, at most 4 GiB - 1 */
    bool lenient; /* accept what old servers send: ,nan(x) ,-nan ,5. ,.5 and >-1 as null */
    const vkp_env *env;
} vkp_resp_config;

#endif /* VKP_NO_IO */
