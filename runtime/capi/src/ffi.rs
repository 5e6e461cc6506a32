//! The functions of the header.

use std::ffi::{CStr, CString, c_char, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr;

use flamingo_runtime::{Limits, Mark, Model, PromptFile, Session};

use crate::options::{GenerateForm, ModelForm, read};

/// A model opened from an artifact.
pub struct FlamingoModel(Model);

/// A conversation with a model.
pub struct FlamingoSession(Session);

/// Gets text as it is generated, UTF-8 and ended by NUL, with the pointer that was given beside the function; false ends
/// the generation.
pub type FlamingoOnText =
    Option<unsafe extern "C" fn(text: *const c_char, user: *mut c_void) -> bool>;

/// Runs `body`; an error, or a panic, goes to `error`.
///
/// # Safety
/// `error` is NULL or valid for a write.
unsafe fn guard<T>(error: *mut *mut c_char, body: impl FnOnce() -> Result<T, String>) -> Option<T> {
    let result = catch_unwind(AssertUnwindSafe(body));
    let result = result.unwrap_or_else(|_| Err("internal error: a panic, reported above".into()));
    let (value, message) = match result {
        Ok(value) => (Some(value), ptr::null_mut()),
        Err(message) => (None, to_c(&message)),
    };
    match error.is_null() {
        // SAFETY: the caller gives a pointer that is valid for a write.
        false => unsafe { error.write(message) },
        // SAFETY: the message is ours and goes nowhere.
        true => unsafe { flamingo_string_free(message) },
    }
    value
}

/// A string for C; a NUL inside ends it.
fn to_c(text: &str) -> *mut c_char {
    let bytes = text.split('\0').next().unwrap_or_default();
    CString::new(bytes).unwrap_or_default().into_raw()
}

/// A string of C, `None` for NULL.
///
/// # Safety
/// NULL, or a string ended by NUL that lives as long as the result.
unsafe fn from_c<'a>(text: *const c_char, what: &str) -> Result<Option<&'a str>, String> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller gives a string ended by NUL.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().map(Some).map_err(|_| format!("{what}: expected UTF-8"))
}

/// Opens an artifact. `options`, JSON or NULL: `backend`, `threads`, `kv`, `verify`, as the options of `flamingoc run`.
/// NULL on error.
///
/// # Safety
/// Strings are NULL or ended by NUL; `error` is NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_model_open(
    path: *const c_char,
    options: *const c_char,
    error: *mut *mut c_char,
) -> *mut FlamingoModel {
    let open = || {
        // SAFETY: as this function's.
        let (path, options) = unsafe { (from_c(path, "path")?, from_c(options, "options")?) };
        let path = path.ok_or("path: expected an artifact, found NULL")?;
        let options = read::<ModelForm>(options)?.options()?;
        let model = Model::open(Path::new(path), &options).map_err(|error| error.to_string())?;
        Ok(Box::into_raw(Box::new(FlamingoModel(model))))
    };
    // SAFETY: as this function's.
    unsafe { guard(error, open) }.unwrap_or(ptr::null_mut())
}

/// Gives a model back; its sessions stay usable.
///
/// # Safety
/// NULL, or a model of this library that was not given back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_model_free(model: *mut FlamingoModel) {
    if !model.is_null() {
        // SAFETY: it came from `Box::into_raw`, and is given back once.
        drop(unsafe { Box::from_raw(model) });
    }
}

/// An empty conversation. NULL on error.
///
/// # Safety
/// `model` is one of this library; `error` is NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_new(
    model: *const FlamingoModel,
    error: *mut *mut c_char,
) -> *mut FlamingoSession {
    let new = || {
        // SAFETY: as this function's.
        let model = unsafe { model.as_ref() }.ok_or("model: found NULL")?;
        let session = model.0.session().map_err(|error| error.to_string())?;
        Ok(Box::into_raw(Box::new(FlamingoSession(session))))
    };
    // SAFETY: as this function's.
    unsafe { guard(error, new) }.unwrap_or(ptr::null_mut())
}

/// A conversation that has the same so far and goes its own way; the common part lies in memory once. NULL for NULL.
///
/// # Safety
/// `session` is NULL or one of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_fork(
    session: *const FlamingoSession,
) -> *mut FlamingoSession {
    // SAFETY: as this function's.
    match unsafe { session.as_ref() } {
        Some(session) => Box::into_raw(Box::new(FlamingoSession(session.0.fork()))),
        None => ptr::null_mut(),
    }
}

/// Gives a conversation back.
///
/// # Safety
/// NULL, or a session of this library that was not given back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_free(session: *mut FlamingoSession) {
    if !session.is_null() {
        // SAFETY: it came from `Box::into_raw`, and is given back once.
        drop(unsafe { Box::from_raw(session) });
    }
}

/// Appends a turn and reads it: `{"segments": [{"image": "a.jpg"}, {"text": "Question: …"}]}`, as a prompt file of
/// `flamingoc run`; paths are relative to the working directory. After an error the session is as before.
///
/// # Safety
/// `session` is one of this library, used by no other thread; `turn` is NULL or ended by NUL; `error` is NULL or valid
/// for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_append(
    session: *mut FlamingoSession,
    turn: *const c_char,
    error: *mut *mut c_char,
) -> bool {
    let append = || {
        // SAFETY: as this function's.
        let session = unsafe { session.as_mut() }.ok_or("session: found NULL")?;
        // SAFETY: as this function's.
        let turn = unsafe { from_c(turn, "turn") }?.ok_or("turn: found NULL")?;
        let turn = PromptFile::from_json(turn).map_err(|reason| format!("turn: {reason}"))?;
        session.0.append(&turn, &Limits::default()).map_err(|error| error.to_string())
    };
    // SAFETY: as this function's.
    unsafe { guard(error, append) }.is_some()
}

/// Generates an answer, which becomes part of the conversation. `options`, JSON or NULL: `max_new_tokens`, `temperature`,
/// `top_k`, `top_p`, `repetition_penalty`, `no_repeat_ngram`, `seed`, `num_beams`, `length_penalty`, `stop` (list of texts), `timeout_ms`.
/// Returns what `flamingoc run --json` prints, to be freed with [`flamingo_string_free`]; NULL on error.
///
/// # Safety
/// `session` is one of this library, used by no other thread; `options` is NULL or ended by NUL; `on_text` is NULL or may
/// be called with `user` until this function returns; `error` is NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_generate(
    session: *mut FlamingoSession,
    options: *const c_char,
    on_text: FlamingoOnText,
    user: *mut c_void,
    error: *mut *mut c_char,
) -> *mut c_char {
    let generate = || {
        // SAFETY: as this function's.
        let session = unsafe { session.as_mut() }.ok_or("session: found NULL")?;
        // SAFETY: as this function's.
        let options = read::<GenerateForm>(unsafe { from_c(options, "options") }?)?.options();
        let cancel = options.limits.cancel.clone();
        let mut pass_on = |text: &str| {
            let Some(on_text) = on_text else { return };
            let text = to_c(text);
            // SAFETY: the caller gives a function that may be called with `user`; the text lives until it is freed below.
            let goes_on = unsafe { on_text(text, user) };
            // SAFETY: the text is ours.
            unsafe { flamingo_string_free(text) };
            if !goes_on {
                cancel.cancel();
            }
        };
        let answer =
            session.0.generate(&options, &mut pass_on).map_err(|error| error.to_string())?;
        Ok(to_c(&answer.to_json().to_string()))
    };
    // SAFETY: as this function's.
    unsafe { guard(error, generate) }.unwrap_or(ptr::null_mut())
}

/// Tokens of the conversation so far: a mark for [`flamingo_session_rewind`]. 0 for NULL.
///
/// # Safety
/// `session` is NULL or one of this library.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_mark(session: *const FlamingoSession) -> usize {
    // SAFETY: as this function's.
    unsafe { session.as_ref() }.map_or(0, |session| session.0.mark().n_tokens())
}

/// Forgets everything since a mark.
///
/// # Safety
/// `session` is one of this library, used by no other thread; `error` is NULL or valid for a write.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_session_rewind(
    session: *mut FlamingoSession,
    mark: usize,
    error: *mut *mut c_char,
) -> bool {
    let rewind = || {
        // SAFETY: as this function's.
        let session = unsafe { session.as_mut() }.ok_or("session: found NULL")?;
        session.0.rewind(Mark::at(mark)).map_err(|error| error.to_string())
    };
    // SAFETY: as this function's.
    unsafe { guard(error, rewind) }.is_some()
}

/// Frees a string that this library returned.
///
/// # Safety
/// NULL, or a string of this library that was not freed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn flamingo_string_free(text: *mut c_char) {
    if !text.is_null() {
        // SAFETY: it came from `CString::into_raw`, and is freed once.
        drop(unsafe { CString::from_raw(text) });
    }
}
