//! Bodies of answers, read up to a limit: whatever answers at a port is not trusted to stop.

use reqwest::Response;

/// Why a body was not read.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The connection broke.
    #[error(transparent)]
    Broken(#[from] reqwest::Error),
    /// The body is longer than the limit.
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
}

/// The whole body, unless it is longer than `most` bytes.
pub async fn body(mut answer: Response, most: usize) -> Result<Vec<u8>, BodyError> {
    let mut body = Vec::new();
    while let Some(chunk) = answer.chunk().await? {
        if chunk.len() > most - body.len() {
            return Err(BodyError::TooLong(most));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_is_read_up_to_the_limit_and_not_beyond() {
        let answer = || Response::from(axum::http::Response::new("12345"));
        assert_eq!(body(answer(), 5).await.unwrap(), b"12345");
        assert!(matches!(body(answer(), 4).await, Err(BodyError::TooLong(4))));
    }
}
