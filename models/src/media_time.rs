//! The mask rule: which picture a text token sees (paper §2.4, function φ).

use crate::config::{Family, SpecialTokens};

/// For each token the number of the medium it sees: 0 none, t the t-th `<image>` of the text.
///
/// A token sees the last `<image>` at or before it. In IDEFICS the end-of-text token still sees
/// it and the tokens after do not, until the next `<image>`
/// (transformers `image_attention_mask_for_packed_input_ids`).
///
/// ```
/// use flamingo_models::{Family, SpecialTokens, media_time};
/// let tokens = SpecialTokens { image: 9, end: Some(2), ..SpecialTokens::default() };
/// assert_eq!(media_time(Family::OpenFlamingo, &tokens, &[1, 9, 5, 2, 5, 9]), [0, 1, 1, 1, 1, 2]);
/// assert_eq!(media_time(Family::Idefics, &tokens, &[1, 9, 5, 2, 5, 9]), [0, 1, 1, 1, 0, 2]);
/// ```
pub fn media_time(family: Family, tokens: &SpecialTokens, input_ids: &[u32]) -> Vec<u32> {
    let mut clock = MediaClock::new(family, tokens);
    input_ids.iter().map(|id| clock.tick(*id)).collect()
}

/// [`media_time`] one token at a time, for sequences that grow.
#[derive(Clone, Debug)]
pub struct MediaClock {
    image: u32,
    /// The token after which no medium is seen, where the family has one.
    forget: Option<u32>,
    n_seen: u32,
    now: u32,
    last: u32,
}

impl MediaClock {
    /// Before the first token.
    pub fn new(family: Family, tokens: &SpecialTokens) -> MediaClock {
        let forget = match family {
            Family::Idefics => tokens.end,
            Family::OpenFlamingo | Family::Otter | Family::FlamingoPytorch => None,
        };
        MediaClock { image: tokens.image, forget, n_seen: 0, now: 0, last: 0 }
    }

    /// The medium that the next token `id` sees.
    pub fn tick(&mut self, id: u32) -> u32 {
        if id == self.image {
            self.n_seen += 1;
            self.now = self.n_seen;
        }
        let seen = self.now;
        self.last = seen;
        if Some(id) == self.forget {
            self.now = 0;
        }
        seen
    }

    /// The medium that generated tokens see: the one that the last given token sees, whatever is
    /// generated (open_flamingo `generate` with cached media; transformers repeats the last mask
    /// row). The clock stays where it is: tokens given afterwards, as the next turn of a
    /// conversation, see what they would see had nothing been generated before them.
    pub fn generated(&self) -> u32 {
        self.last
    }

    /// `<image>` tokens so far.
    pub fn n_media(&self) -> u32 {
        self.n_seen
    }
}
