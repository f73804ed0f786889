#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resp   RESP reader and writer                                                     */

/* Open an incremental reader. The reader allocates for bytes that arrived, never for a length or
   count that a header announces. NULL config: all defaults.
   Owns:   borrows config; gives *reader     Blocks: never     Threads: any     In callbacks: ok
   Errors: NOMEM, INVALID (reader NULL, max_depth or max_frame_bytes above its maximum)        */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_open(const vkp_resp_config *config,
                                                      vkp_resp_reader **reader);

/* Free the reader and the values that it returned. NULL is ignored. Any thread, one at a time. */
VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader);

/* Append bytes to the reader's own buffer. NULL data is allowed with len 0.
   Owns:   borrows data (copies)     Blocks: never     Threads: any, one at a time
   Errors: NOMEM (nothing was appended), PROTOCOL or LIMIT (the reader's earlier error), INVALID */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data,
                                                      size_t len);

/* Read the next whole value of the bytes that vkp_resp_reader_feed appended.
   Owns:   *value views the reader until the next call on the reader
   Blocks: never     Threads: any, one at a time     In callbacks: ok
   Errors: EMPTY (feed more bytes), PROTOCOL and LIMIT (each later call returns the error until
   reset: see vkp_resp_reader_get_error), NOMEM (call again), INVALID                          */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_next(vkp_resp_reader *reader,
                                                      const vkp_value **value);

/* Read one value from the caller's bytes, without a copy. On OK *consumed is the length of the
   frame; the next window starts behind the frame. On EMPTY and NOMEM call again with the SAME
   bytes, possibly moved, and after EMPTY with more bytes behind them: the reader continues at its
   position. While a frame is incomplete do not change between scan and feed with next.
   Owns:   borrows window; *value views window, and the reader until the next call on the reader
   Blocks: never     Threads: any, one at a time     In callbacks: ok
   Errors: EMPTY (more bytes are needed), PROTOCOL and LIMIT (each later call returns the error
   until reset), NOMEM, INVALID                                                                */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *window,
                                                      size_t len, const vkp_value **value,
                                                      size_t *consumed);

/* The reason of the reader's error, with the limit or the byte; "" when there is no error.
   *position is the byte of the error, counted from open or reset; position may be NULL. Views the
   reader until the next call on it. Any thread, one at a time.                                */
VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position);

/* Drop the error, the fed bytes and the incomplete frame. Positions count from 0 again. Any
   thread, one at a time.                                                                      */
VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader);

/* The length of the first frame in the bytes; 0 when the frame is incomplete or malformed. Only for
   bytes that a reader without lenient accepted before. Any thread.                            */
VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len);

/* Builds RESP in one growing block. The struct is the caller's memory; its fields are private. The
   writer keeps the first error: call all put functions, then check the result of
   vkp_resp_writer_take.                                                                       */
typedef struct vkp_resp_writer {
    const vkp_env *i_env; /* private */
    vkp_block *i_block;   /* private */
    size_t i_len;         /* private */
    vkp_status i_status;  /* private */
} vkp_resp_writer;

/* Prepare an empty writer. NULL env: all defaults. Call this first, then the put functions. Any
   thread, one at a time.                                                                      */
VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env);

/* Put the header of an ARRAY, SET, PUSH, MAP or ATTRIBUTE; the elements follow. count is that of
   the wire: pairs for a MAP or ATTRIBUTE. Any thread, one at a time.                          */
VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count);

/* Put a bulk string ($) of any bytes. NULL data is allowed with len 0. Any thread, one at a
   time.                                                                                       */
VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len);

/* Put a simple string (+). The text is one line: a CR or LF is an error, INVALID. Any thread, one
   at a time.                                                                                  */
VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text);

/* Put an error (-). The text is one line: a CR or LF is an error, INVALID. Any thread, one at a
   time.                                                                                       */
VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text);

/* Put an integer (:). Any thread, one at a time. */
VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value);

/* Put a double (,) so that reading it gives the same number, in any locale; nan, inf and -inf
   too. Any thread, one at a time.                                                             */
VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value);

/* Put a boolean (#). Any thread, one at a time. */
VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value);

/* Put the null of RESP3 (_). Any thread, one at a time. */
VKP_API void vkp_resp_put_null(vkp_resp_writer *writer);

/* Put bytes unchanged, without a header; they are not checked. NULL data is allowed with len 0.
   Any thread, one at a time.                                                                  */
VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len);

/* Put a whole command, made from a format as vkp_client_commandf describes it: with several of them
   in one writer vkp_client_send sends commands that stay together. Errors: INVALID (a wrong format,
   nothing in it, NULL for a %s or for bytes of a %b). Any thread, one at a time.              */
VKP_API void vkp_resp_put_commandf(vkp_resp_writer *writer, const char *format, ...);

/* vkp_resp_put_commandf with the arguments of a caller that is variadic itself; it calls va_end.
   Any thread, one at a time.                                                                  */
VKP_API void vkp_resp_put_vcommandf(vkp_resp_writer *writer, const char *format, va_list arguments);

/* Put a whole value. protocol 3: as RESP3. Otherwise as a server writes to a RESP2 client: maps,
   sets and pushes as arrays, doubles and big numbers as bulk strings, booleans as 0 and 1, null
   as $-1 unless it was received as *-1, errors as one line, no attributes. VKP_VALUE_OUT_OF_BAND
   pushes inside the value are left out. Any thread, one at a time.                            */
VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol);

/* Take the bytes, or the first error of the put functions. The writer is then empty and without an
   error, after a failure too.
   Owns:   gives *bytes     Blocks: never     Threads: any, one at a time
   Errors: NOMEM, LIMIT (above 4 GiB - 1), INVALID (a CR or LF in put_simple or put_error,
   a format: see vkp_resp_put_commandf)                                                       */
VKP_API VKP_NODISCARD vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes);

/* Free the bytes that were not taken. The writer is then empty and may be used again. NULL is
   ignored. Any thread, one at a time.                                                         */
VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer);

#endif /* VKP_NO_IO */
