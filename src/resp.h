#ifndef VKP_NO_IO
/* --------------------------------------------------------------------------------------
   >>api-resp   RESP reader and writer                                                     */

/* Open an incremental reader. It allocates as bytes arrive, never for what a header announces.
   Owns:   borrows config; gives *reader   Blocks: never   Threads: any, one at a time
   Errors: NOMEM, INVALID                                                                      */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_open(const vkp_resp_config *config,
                                                      vkp_resp_reader **reader);

/* Free the reader and the values it gave. NULL is ignored. */
VKP_API void vkp_resp_reader_unref(vkp_resp_reader *reader);

/* Append bytes to the reader's own buffer.
   Owns:   borrows data (copies)     Blocks: never     Threads: the reader's
   Errors: NOMEM (nothing was taken), or the reader's earlier error                            */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_feed(vkp_resp_reader *reader, const void *data,
                                                      size_t len);

/* The next whole value of what was fed.
   Owns:   *value views the reader: valid until the next call on it     Blocks: never
   Errors: EMPTY (feed more), PROTOCOL, LIMIT (both sticky: see vkp_resp_reader_get_error), NOMEM
   (try again)                                                                                 */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_next(vkp_resp_reader *reader,
                                                      const vkp_value **value);

/* The same without a copy: read one value from a window of the caller's. On EMPTY call again
   with the SAME bytes, possibly moved, and more behind them: the reader goes on where it was.
   On OK *consumed is the length of the frame; the next window starts behind it.
   Owns:   borrows window; *value views the window and the reader     Blocks: never
   Errors: as vkp_resp_reader_next; not to be mixed with feed between two frames               */
VKP_API VKP_NODISCARD vkp_status vkp_resp_reader_scan(vkp_resp_reader *reader, const void *window,
                                                      size_t len, const vkp_value **value,
                                                      size_t *consumed);

/* What was wrong and where: the byte's position since open or reset, and the reason with the
   limit or byte named. "" while there is no error. Views: until the next call on the reader.   */
VKP_API const char *vkp_resp_reader_get_error(const vkp_resp_reader *reader, uint64_t *position);

/* Forget the error, the buffer and the frame under way. */
VKP_API void vkp_resp_reader_reset(vkp_resp_reader *reader);

/* Length of the first whole frame in the bytes, 0 when it is incomplete or broken. For bytes that
   a strict reader accepted before. Any thread.                                                */
VKP_API size_t vkp_resp_get_frame_len(const uint8_t *data, size_t len);

/* Builds RESP into one growing block. In the caller's memory; fields are private. Errors are
   kept: write everything, then look at what take returns.                                     */
typedef struct vkp_resp_writer {
    const vkp_env *i_env;
    vkp_block *i_block;
    size_t i_len;
    vkp_status i_status;
} vkp_resp_writer;

/* Begin; then put values. Counts are the wire's: pairs for a MAP or ATTRIBUTE. Texts of simple
   strings and errors are one line; raw bytes go out as they are. Writer's thread.             */
VKP_API void vkp_resp_writer_init(vkp_resp_writer *writer, const vkp_env *env);
VKP_API void vkp_resp_put_aggregate(vkp_resp_writer *writer, vkp_resp_type type, size_t count);
VKP_API void vkp_resp_put_bulk(vkp_resp_writer *writer, const void *data, size_t len);
VKP_API void vkp_resp_put_simple(vkp_resp_writer *writer, vkp_str text);
VKP_API void vkp_resp_put_error(vkp_resp_writer *writer, vkp_str text);
VKP_API void vkp_resp_put_integer(vkp_resp_writer *writer, int64_t value);
VKP_API void vkp_resp_put_double(vkp_resp_writer *writer, double value);
VKP_API void vkp_resp_put_bool(vkp_resp_writer *writer, bool value);
VKP_API void vkp_resp_put_null(vkp_resp_writer *writer);
VKP_API void vkp_resp_put_raw(vkp_resp_writer *writer, const void *data, size_t len);

/* A whole value, in RESP3, or as a server writes it to a RESP2 client (maps and sets as arrays,
   doubles as bulk strings, booleans as 0 and 1, null as $-1 unless it came as *-1, attributes not
   at all).                                                                                    */
VKP_API void vkp_resp_put_value(vkp_resp_writer *writer, const vkp_value *value, int protocol);

/* End the building: the bytes, or the first error met.
   Owns:   gives *bytes; the writer is empty again, its error forgotten
   Errors: NOMEM, LIMIT (4 GiB), INVALID (a CR or LF in put_simple or put_error)               */
VKP_API VKP_NODISCARD vkp_status vkp_resp_writer_take(vkp_resp_writer *writer, vkp_bytes *bytes);

/* Drop what was built. */
VKP_API void vkp_resp_writer_deinit(vkp_resp_writer *writer);

#endif /* VKP_NO_IO */
