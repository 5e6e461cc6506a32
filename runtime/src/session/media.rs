//! The media of a session. Those of a bank are made when a token first sees them: keys and values of the tokens before
//! may lie in the bank too.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::Medium;
use crate::answer::CacheCounts;
use crate::backend::Media;
use crate::bank::KeptMedium;
use crate::model::{Model, RunError};
use crate::visual_cache::{Found, MediaKey};

/// A medium that comes into a session.
pub(crate) enum Given {
    /// It is there.
    Made(Medium),
    /// Its visual tokens lie in a bank.
    Kept(KeptMedium),
}

/// Media in the order of the text.
#[derive(Clone, Debug, Default)]
pub(super) struct SessionMedia {
    /// For each medium its numbers, or those of another while it is among `kept`.
    made: Vec<Arc<Media>>,
    keys: Vec<Option<MediaKey>>,
    /// Media that no token has seen yet, by place.
    kept: BTreeMap<usize, KeptMedium>,
}

impl SessionMedia {
    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn keys(&self) -> &[Option<MediaKey>] {
        &self.keys
    }

    /// All media; engines look only at those that a token sees, which [`SessionMedia::make`] makes.
    pub(super) fn made(&self) -> &[Arc<Media>] {
        &self.made
    }

    pub(super) fn push(&mut self, given: Given) {
        match given {
            Given::Made(Medium { media, key }) => {
                self.made.push(media);
                self.keys.push(key);
            }
            Given::Kept(kept) => {
                self.keys.push(Some(kept.key));
                self.kept.insert(self.made.len(), kept);
                self.made.push(Arc::default());
            }
        }
    }

    pub(super) fn truncate(&mut self, len: usize) {
        self.made.truncate(len);
        self.keys.truncate(len);
        self.kept.retain(|place, _| *place < len);
    }

    /// Makes the media that tokens with these numbers see. Engines check sizes of all media, so that the others are
    /// stood in for by one that is there.
    pub(super) fn make(
        &mut self,
        media_time: &[u32],
        model: &Model,
        counts: &mut CacheCounts,
    ) -> Result<(), RunError> {
        if self.kept.is_empty() {
            return Ok(());
        }
        let seen = media_time.iter().filter_map(|time| usize::try_from(*time).ok()?.checked_sub(1));
        let mut places: Vec<usize> = seen.filter(|place| self.kept.contains_key(place)).collect();
        if places.is_empty() && self.kept.len() == self.made.len() {
            places.extend(self.kept.keys().next_back());
        }
        for place in places {
            let Some(kept) = self.kept.get(&place) else { continue };
            let (media, found) = model.kept_medium(kept)?;
            counts.visual_disk_hits += usize::from(found == Found::Disk);
            self.made[place] = media;
            self.kept.remove(&place);
        }
        let is_made = |(place, _): &(usize, &Arc<Media>)| !self.kept.contains_key(place);
        let stand_in =
            self.made.iter().enumerate().find(is_made).map(|(_, media)| Arc::clone(media));
        for place in self.kept.keys() {
            self.made[*place] = stand_in.clone().unwrap_or_default();
        }
        Ok(())
    }

    /// Memory of the media that are there, each once.
    pub(super) fn bytes(&self) -> usize {
        let is_first = |(place, media): &(usize, &Arc<Media>)| {
            !self.made[..*place].iter().any(|other| Arc::ptr_eq(other, media))
        };
        self.made.iter().enumerate().filter(is_first).map(|(_, media)| media.bytes()).sum()
    }
}
