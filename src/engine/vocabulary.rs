//! Checks whether two servers mean the same text by the same token ids.

use crate::speculation::Token;
use crate::upstream::{LlamaServer, UpstreamError};

/// Tokens compared per request.
const BLOCK: usize = 4096;

/// Result of a comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VocabularyComparison {
    /// Both servers agree on all ids that they share.
    Same {
        /// Size of the target's vocabulary.
        target_size: usize,
    },
    /// They differ; one sentence that says where.
    Different(String),
}

/// Compares the vocabularies token by token.
///
/// Sizes may differ (models of one family pad theirs differently): ids that only one of them has are never offered.
pub async fn compare(draft: &LlamaServer, target: &LlamaServer) -> Result<VocabularyComparison, UpstreamError> {
    let (draft_size, target_size) = (draft.vocabulary_size().await?, target.vocabulary_size().await?);
    let shared = draft_size.min(target_size);
    let (mut start, mut end) = (0, shared.min(BLOCK));
    // A block that differs is halved until one token is left.
    while start < end {
        let ids: Vec<Token> = (start..end).filter_map(|id| Token::try_from(id).ok()).collect();
        let (theirs, ours) = (draft.detokenize(&ids).await?, target.detokenize(&ids).await?);
        if theirs == ours {
            start = end;
            end = shared.min(start + BLOCK);
        } else if end - start == 1 {
            return Ok(VocabularyComparison::Different(format!(
                "the vocabularies differ: token {start} is {theirs:?} to the drafter ({draft_size} tokens) and {ours:?} \
                 to the target ({target_size} tokens); take a drafter of the target's model family"
            )));
        } else {
            end = start + (end - start) / 2;
        }
    }
    Ok(VocabularyComparison::Same { target_size })
}
