//! HTTP clients for the servers behind this process, set up in one place, and answers read within bounds.
//!
//! A server behind this process is not trusted: it may be broken, or another program may listen on its port. So no client
//! follows a redirect, which could send its key elsewhere, and every body and line is read with a limit.

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Stream, StreamExt, stream};
use reqwest::{ClientBuilder, Response};
use serde::de::DeserializeOwned;

/// Why an answer could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The connection broke, or the time was up.
    #[error(transparent)]
    Broken(#[from] reqwest::Error),
    /// The body is longer than its reader takes.
    #[error("its answer is longer than {limit} bytes")]
    BodyTooLong {
        /// Most bytes of a body.
        limit: usize,
    },
    /// A line is longer than its reader takes.
    #[error("a line of its answer is longer than {limit} bytes")]
    LineTooLong {
        /// Most bytes of a line.
        limit: usize,
    },
    /// The body is not the expected JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Starts a client that uses no proxy of the environment, follows no redirect and sends no referrer.
///
/// [`ClientBuilder::build`] fails only when TLS cannot be set up. Pass that failure on: `Client::default()` would panic
/// instead, and would use the environment's proxy.
#[expect(clippy::disallowed_methods, reason = "the one place that sets up clients")]
pub fn builder() -> ClientBuilder {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
}

/// Reads a body of at most `limit` bytes.
pub async fn bytes(response: Response, limit: usize) -> Result<Bytes, ReadError> {
    let announced = response.content_length().unwrap_or_default();
    if usize::try_from(announced).map_or(true, |length| length > limit) {
        return Err(ReadError::BodyTooLong { limit });
    }
    let (body, whole) = up_to(response, limit).await?;
    whole.then_some(body).ok_or(ReadError::BodyTooLong { limit })
}

/// Reads a body of at most `limit` bytes as JSON.
pub async fn json<T: DeserializeOwned>(response: Response, limit: usize) -> Result<T, ReadError> {
    Ok(serde_json::from_slice(&bytes(response, limit).await?)?)
}

/// Reads the first `limit` bytes of a body as text; empty if the body breaks off.
pub async fn beginning(response: Response, limit: usize) -> String {
    let (body, _) = up_to(response, limit).await.unwrap_or_default();
    String::from_utf8_lossy(&body).into_owned()
}

/// The first `limit` bytes of a body, and whether that is all of it.
async fn up_to(mut response: Response, limit: usize) -> Result<(Bytes, bool), reqwest::Error> {
    let mut body = BytesMut::new();
    while let Some(chunk) = response.chunk().await? {
        let room = limit - body.len();
        if chunk.len() > room {
            body.extend_from_slice(&chunk[..room]);
            return Ok((body.freeze(), false));
        }
        body.extend_from_slice(&chunk);
    }
    Ok((body.freeze(), true))
}

/// Splits a body into lines of at most `limit` bytes, without their ends, as they come. Leaves out a last line without an
/// end. The stream is over after an error.
pub fn lines(response: Response, limit: usize) -> impl Stream<Item = Result<Bytes, ReadError>> + Send + 'static {
    let lines = Lines {
        chunks: response.bytes_stream().boxed(),
        buffer: BytesMut::new(),
        searched: 0,
        limit,
    };
    stream::unfold(Some(lines), |lines| async move {
        let mut lines = lines?;
        match lines.next().await? {
            Ok(line) => Some((Ok(line), Some(lines))),
            Err(error) => Some((Err(error), None)),
        }
    })
}

struct Lines<S> {
    chunks: S,
    buffer: BytesMut,
    /// Length of the part of the buffer that is known to have no line end.
    searched: usize,
    limit: usize,
}

impl<S: Stream<Item = reqwest::Result<Bytes>> + Unpin> Lines<S> {
    async fn next(&mut self) -> Option<Result<Bytes, ReadError>> {
        let too_long = Some(Err(ReadError::LineTooLong { limit: self.limit }));
        loop {
            let unsearched = &self.buffer[self.searched..];
            if let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + end).freeze();
                self.buffer.advance(1);
                self.searched = 0;
                return if line.len() > self.limit {
                    too_long
                } else {
                    Some(Ok(line))
                };
            }
            self.searched = self.buffer.len();
            if self.searched > self.limit {
                return too_long;
            }
            match self.chunks.next().await? {
                Ok(chunk) => self.buffer.extend_from_slice(&chunk),
                Err(error) => return Some(Err(error.into())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(chunks: Vec<Vec<u8>>) -> Response {
        let chunks = stream::iter(chunks.into_iter().map(Ok::<_, std::io::Error>));
        http::Response::new(reqwest::Body::wrap_stream(chunks)).into()
    }

    fn run<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap()
            .block_on(future)
    }

    #[test]
    fn a_body_is_read_up_to_its_limit_and_no_further() {
        let body = || answer(vec![b"[1,".to_vec(), b"2]".to_vec()]);
        assert_eq!(run(json::<Vec<u8>>(body(), 5)).unwrap(), [1, 2]);
        let error = run(bytes(body(), 4)).unwrap_err().to_string();
        assert_eq!(error, "its answer is longer than 4 bytes");
        assert_eq!(run(beginning(body(), 4)), "[1,2");
        assert_eq!(run(beginning(body(), 9)), "[1,2]");
    }

    #[test]
    fn an_endless_body_is_given_up() {
        let endless = stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b'x'; 1000]));
        let answer = http::Response::new(reqwest::Body::wrap_stream(endless)).into();
        assert!(matches!(
            run(bytes(answer, 10_000)),
            Err(ReadError::BodyTooLong { limit: 10_000 })
        ));
    }

    #[test]
    fn a_line_that_does_not_end_is_given_up() {
        let told = |chunks| run(lines(answer(chunks), 3).collect::<Vec<_>>());
        for chunks in [
            vec![b"ab\nabcd".to_vec()],
            vec![b"ab\nabcd\nab\n".to_vec()],
            vec![b"ab\n".to_vec(), vec![b'a'; 4]],
        ] {
            let told = told(chunks);
            assert!(
                matches!(&told[..], [Ok(line), Err(ReadError::LineTooLong { limit: 3 })] if &line[..] == b"ab"),
                "{told:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn how_the_bytes_are_cut_makes_no_difference(texts in prop::collection::vec("[a-zäöü日]{0,8}", 0..8), size in 1_usize..9) {
            let body = texts.iter().fold(String::new(), |body, text| body + text + "\n") + "cut";
            let cut = body.as_bytes().chunks(size).map(<[u8]>::to_vec).collect();
            let read = run(lines(answer(cut), 100).collect::<Vec<_>>());
            let read: Vec<Bytes> = read.into_iter().map(Result::unwrap).collect();
            prop_assert_eq!(read, texts);
        }
    }
}
