//! The public conversation: posts that everybody reads and one client has signed (PROTOCOL 9.9).
//!
//! Nothing is sealed here. A [`Post`] comes in with its author's verified bundle and is his word for this network, or it is
//! nobody's. Which of them are new, the caller knows.

use super::bundle::{Bundle, BundleKeys, join};
use super::chain::MAX_KIND;
use crate::crypto::{HASH_LEN, SIGNATURE_LEN, hash, verify};
use crate::error::{ApiMisuse, Error};
use crate::wire::{ID_LEN, MAX_POST_LEN, Member, Post};

const LABEL: &[u8; 15] = b"ossicle public\0";
const MESSAGE_LEN: usize = LABEL.len() + HASH_LEN + ID_LEN + HASH_LEN + 4 + 8 + 8 + 1 + HASH_LEN;

impl Post<'_> {
    /// What its author signs, whatever its `signature` is. `network` is the fingerprint of the server's key: elsewhere the
    /// post is nobody's word.
    ///
    /// # Errors
    /// [`ApiMisuse::InvalidArgument`] unless kind and length are what a post may have.
    pub fn sign(
        &self,
        network: &[u8; HASH_LEN],
        author: &Member,
        keys: &BundleKeys,
    ) -> Result<[u8; SIGNATURE_LEN], Error> {
        if self.is_proper() {
            Ok(keys.signing_key().sign(&self.message(network, author)))
        } else {
            Err(ApiMisuse::InvalidArgument.into())
        }
    }

    /// Verifies that the client with this (verified) bundle said so in the network of the server with this fingerprint. The
    /// bundle's epoch may be another than the post's, as long as its `verifying` key is the same.
    ///
    /// # Errors
    /// [`Error::Crypto`] if it did not; [`Error::Decode`] for what nobody may say.
    pub fn verify(&self, network: &[u8; HASH_LEN], author: &Bundle) -> Result<(), Error> {
        if !self.is_proper() {
            return Err(Error::Decode);
        }
        let member = Member { id: author.id, key: author.key };
        verify(&author.verifying, &self.message(network, &member), self.signature.0)
    }

    /// Whether kind and length are what a post may have.
    pub const fn is_proper(&self) -> bool {
        self.kind <= MAX_KIND && !self.body.is_empty() && self.body.len() <= MAX_POST_LEN
    }

    fn message(&self, network: &[u8; HASH_LEN], author: &Member) -> [u8; MESSAGE_LEN] {
        join(&[
            LABEL,
            network,
            &author.id,
            &author.key,
            &self.epoch.to_be_bytes(),
            &self.number.to_be_bytes(),
            &self.at.to_be_bytes(),
            &[self.kind],
            &hash(&[self.body]),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Client, TestRng};
    use super::*;
    use crate::crypto::{ExchangeKey, Secret, SigningKey};
    use crate::wire::testing::printed_array;
    use crate::wire::{Body, Fixed, Message, Say};

    const NETWORK: [u8; 32] = [0xa5; 32];

    fn post<'d>(body: &'d [u8], signature: &'d [u8; 64]) -> Post<'d> {
        Post { number: 7, at: 1_790_000_000_123, epoch: 3, kind: 0, signature: Fixed(signature), body }
    }

    // What PROTOCOL prints was made apart, in another language, from its text.
    #[test]
    fn bytes_are_those_of_the_specification() {
        let [exchange, prekey, signing] = [0x51, 0x52, 0x53].map(|byte| Secret::new([byte; 32]));
        let keys = BundleKeys::new(ExchangeKey::new(exchange), ExchangeKey::new(prekey), 10, SigningKey::new(signing));
        let author = Member { id: [1; 16], key: [2; 32] };
        let bundle = keys.bundle(&author, 9, [0; 32]);
        let payload: [u8; 101] = printed_array("15.8", "Say");
        let Ok(Message::Other(body)) = Message::decode(&payload) else { panic!("a message") };
        let Say { post, .. } = Say::decode(body).unwrap();
        assert_eq!(post.message(&NETWORK, &author), printed_array("15.8", "said"));
        assert_eq!(post.signature.0, &printed_array("15.8", "signature"));
        assert_eq!(post.sign(&NETWORK, &author, &keys), Ok(*post.signature.0));
        assert_eq!(post.verify(&NETWORK, &bundle), Ok(()));
    }

    #[test]
    fn a_post_is_its_authors_word_here_and_as_he_said_it() {
        let (alice, bob) = (Client::new(1), Client::new(2));
        let unsigned = post(b"hello, all", &[0; 64]);
        let signature = unsigned.sign(&NETWORK, &alice.member, &alice.keys).unwrap();
        let said = post(b"hello, all", &signature);
        assert_eq!(said.verify(&NETWORK, &alice.bundle), Ok(()));
        for other in [
            Post { number: 8, ..said },
            Post { at: 0, ..said },
            Post { epoch: 4, ..said },
            Post { kind: 1, ..said },
            Post { body: b"hello, alL", ..said },
            Post { body: b"hello, all ", ..said },
            unsigned,
        ] {
            assert_eq!(other.verify(&NETWORK, &alice.bundle), Err(Error::Crypto), "{other:?}");
        }
        for place in 0..64 {
            let mut broken = signature;
            broken[place] ^= 1;
            assert!(post(b"hello, all", &broken).verify(&NETWORK, &alice.bundle).is_err());
        }
        assert_eq!(said.verify(&[0xa6; 32], &alice.bundle), Err(Error::Crypto), "another network's");
        assert_eq!(said.verify(&NETWORK, &bob.bundle), Err(Error::Crypto), "another's");
        let renamed = Bundle { id: bob.member.id, ..alice.bundle };
        assert_eq!(said.verify(&NETWORK, &renamed), Err(Error::Crypto));
        let rekeyed = Bundle { key: [9; 32], ..alice.bundle };
        assert_eq!(said.verify(&NETWORK, &rekeyed), Err(Error::Crypto));
    }

    #[test]
    fn a_later_bundle_verifies_as_long_as_its_key_is_the_same() {
        let mut alice = Client::new(1);
        let signature = post(b"x", &[0; 64]).sign(&NETWORK, &alice.member, &alice.keys).unwrap();
        alice.keys.rotate(&mut TestRng::new(8)).unwrap();
        let later = alice.keys.bundle(&alice.member, 4, alice.bundle.hash());
        assert_eq!(post(b"x", &signature).verify(&NETWORK, &later), Ok(()));
        let renewed = BundleKeys::generate(900, &mut TestRng::new(90)).unwrap().bundle(&alice.member, 5, later.hash());
        assert_eq!(post(b"x", &signature).verify(&NETWORK, &renewed), Err(Error::Crypto));
    }

    #[test]
    fn what_nobody_may_say_is_not_signed_and_not_verified() {
        let alice = Client::new(1);
        let (longest, longer) = ([7; MAX_POST_LEN], [7; MAX_POST_LEN + 1]);
        let sign = |post: Post<'_>| post.sign(&NETWORK, &alice.member, &alice.keys);
        assert!(sign(post(&longest, &[0; 64])).is_ok());
        for wrong in [post(b"", &[0; 64]), post(&longer, &[0; 64]), Post { kind: MAX_KIND + 1, ..post(b"x", &[0; 64]) }]
        {
            assert_eq!(sign(wrong), Err(ApiMisuse::InvalidArgument.into()));
            let signature = alice.keys.signing_key().sign(&wrong.message(&NETWORK, &alice.member));
            let signed = Post { signature: Fixed(&signature), ..wrong };
            assert_eq!(signed.verify(&NETWORK, &alice.bundle), Err(Error::Decode));
        }
    }

    // A decision that somebody signed is no post, and the other way round: labels and lengths differ.
    #[test]
    fn it_is_read_from_the_message_that_carries_it() {
        let alice = Client::new(1);
        let signature = post(b"x", &[0; 64]).sign(&NETWORK, &alice.member, &alice.keys).unwrap();
        let mut buffer = [0; 256];
        let Ok(Message::Other(body)) = (Say { request: 1, post: post(b"x", &signature) }).encode(&mut buffer) else {
            panic!("a body")
        };
        let body: Body<'_> = body;
        assert_eq!(Say::decode(body).unwrap().post.verify(&NETWORK, &alice.bundle), Ok(()));
    }
}
